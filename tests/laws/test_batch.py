"""Law 5: a batch's tokens are those of each prompt decoded alone and plainly, for every drafter, tree, sampling, size
of the batch, order of admission, preemption and cancellation, on every tested family, stock and fast.

Neighbours may be hostile: drafters that are always right or wrong, broken logits, end tokens, full contexts. Mutations
(a neighbour's cache, positions by row, a path that is not moved, a stale length, a mask bit too many) must be seen.
"""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch

from amphista.cache.static import KVCache
from amphista.drafter.proposer import Proposer
from amphista.engine import scheduler as scheduling
from amphista.engine.batch import Batch, Job
from amphista.engine.loop import EngineLoop
from amphista.engine.loops import loop_free_length
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.request import State
from amphista.engine.scheduler import Limits, Scheduler
from amphista.engine.step import Engine
from amphista.errors import CapacityError, ConfigError, RequestError, TargetError
from amphista.target import lean
from amphista.target.attention import Layout
from amphista.target.spans import Span
from amphista.tree.budget import NodeBudget
from amphista.tree.grow import AutoGrower, parse_tree
from amphista.tree.token_tree import TokenTree
from amphista.tree.tune import Costs
from tests.decoding import begin, decode, step
from tests.oracle.decode import decode_plainly
from tests.tiny import AUTO_TREES, EOS, FAMILIES, VOCAB, WINDOW, Scripted, real_drafters, tiny_target

LENGTHS = [1, 3, WINDOW, WINDOW + 1, 2 * WINDOW + 1, 30, 2, 12, 5, WINDOW - 1, 7]
SETTINGS = [
    {},
    {"temperature": 0.7, "seed": 5},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "seed": 2**63},
    {"repetition_penalty": 1.4},
    {"temperature": 0.9, "repetition_penalty": 1.2, "seed": 8},
]
LIMITS = [24, 9, 1, 17, 30, 5, 22, 13]
JOBS = [
    Job(
        [(7 * i + 31 * length + 3) % 250 for i in range(length)],
        SamplingParams(max_new_tokens=LIMITS[n % len(LIMITS)], **SETTINGS[n % len(SETTINGS)]),
        n,
    )
    for n, length in enumerate(LENGTHS)
]
SHARED = [(11 * i + 5) % 250 for i in range(36)]
LONG = [  # turns of few conversations, so that rows are found again, and answers that need more rows than there are
    Job(
        SHARED[: 36 - 18 * (n % 2)] + [(n + 60) % 250] * (1 + 5 * n),
        SamplingParams(max_new_tokens=50, **SETTINGS[n % 5]),
        n,
    )
    for n in range(9)
]
TREES = {"chain": parse_tree("chain"), "7": parse_tree(7), **AUTO_TREES}


def plainly(target, jobs=JOBS):
    """By tag, each job's output alone, without drafts: (tokens, why it ended)."""
    engine, found = Engine(target, Proposer(), parse_tree(1)), {}
    for job in jobs:
        sequence = decode(engine, job.prompt_ids, job.params)
        found[job.tag] = sequence.output_ids, sequence.finish_reason
    return found


def together(engine, jobs=JOBS, size=4, **options):
    batch = Batch(engine, size, **options)
    results = {}
    for done in batch.run(jobs):
        if done.error is not None:
            raise done.error
        results[done.job.tag] = done.sequence.output_ids, done.sequence.finish_reason
        done.sequence.rows.cache.check_integrity()
    batch.loop.scheduler.check_integrity()
    assert len(results) == len(jobs) and batch.loop.scheduler.free_bytes == batch.limits.kv_bytes
    return results


def knowing(answers, right=True, jobs=JOBS):
    """Heads that know what every sequence of a batch will say, and say it, or never do."""
    texts = [job.prompt_ids + answers[job.tag][0] for job in jobs]

    def offer(state, depth, num_ranks):
        known = state.features[: state.num_rows]
        at = state.num_rows + depth
        text = next((text for text in texts if text[1 : 1 + len(known)] == known), [])
        token = text[at] if at < len(text) else 0
        said = [token, *range(token + 1, token + num_ranks)] if right else range(token + 1, token + 1 + num_ranks)
        return [one % VOCAB for one in said][:num_ranks]

    return Scripted(4, offer)


@pytest.fixture(scope="module", params=["stock", "fast"])
def target(request):
    target = tiny_target(dtype=torch.float64)
    assert request.param == "stock" or target.speed_up()
    return target


@pytest.fixture(scope="module")
def expected(target):
    return plainly(target)


# -- every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_batches_equal_themselves_alone(family):
    target = tiny_target(family, dtype=torch.float64)
    alone = plainly(target)
    for heads, size in ((None, 4), (knowing(alone), 3), (knowing(alone, right=False), len(JOBS) + 2)):
        assert together(Engine(target, Proposer(heads), parse_tree(6)), size=size) == alone, size


def test_equals_decoding_without_any_cache(target, expected):
    model = tiny_target(dtype=torch.float64).model
    for job in JOBS:
        assert expected[job.tag][0] == decode_plainly(model, job.prompt_ids, job.params, {EOS})


# -- drafters, trees, sizes -------------------------------------------------------------------------------------------

DRAFTERS = ["none", "amphista-full", "amphista-own-paths", "medusa-own", "none+lookup", "amphista-paths+lookup"]
DRAFTERS += ["hydra-staged", "eagle-full+lookup", "falcon-pairs"]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", [*DRAFTERS, "right", "wrong"])
def test_batch_equals_alone(target, expected, name, tree):
    drafters = real_drafters(target) | {"right": knowing(expected), "wrong": knowing(expected, right=False)}
    engine = Engine(target, drafters[name], TREES[tree])
    sizes = {"stock": (9, 2), "fast": (6, 1)}[target.path]
    for size in sizes[: 1 + (tree == "7")] if name != "right" else range(1, 10):
        assert together(engine, size=size) == expected, size


def test_steps_are_shared(target, expected):
    engine = Engine(target, knowing(expected), parse_tree("chain"))
    forwards, forward = [], target.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "forward", lambda spans, *taps: forwards.append(spans) or forward(spans, *taps))
        together(engine, size=9)
    trees = [span.tree for spans in forwards for span in spans if not span.only_last]
    steps = [spans for spans in forwards if not spans[0].only_last]
    assert len(steps) < 0.4 * len(trees) and max(map(len, forwards)) == 9
    assert sum(tree.num_nodes > 1 for tree in trees) > 20, "hardly anything was drafted"


def test_heads_of_all_sequences_draft_in_one_pass(target, monkeypatch):
    drafter = real_drafters(target)["amphista-full"]
    asked, draft_all = [], drafter.draft_all
    monkeypatch.setattr(
        drafter, "draft_all", lambda states, *given: asked.append(len(states)) or draft_all(states, *given)
    )
    engine = Engine(target, drafter, parse_tree(7))
    results = together(engine, size=9)
    assert max(asked) >= 7 and results == plainly(target)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_coarse_types_have_the_bits_of_each_sequence_alone(kind):
    """What a last bit could tip over: a tree's forward beside other trees and a chunk, by the C step."""
    target = tiny_target("qwen3", dtype=torch.float32 if kind == "int8" else torch.bfloat16)
    assert target.speed_up(int8=kind == "int8", native=True)
    trees = [TokenTree([5, 6, 7, 8], [-1, 0, 0, 1]), TokenTree([9], [-1]), TokenTree.chain(range(20, 60))]
    caches = [target.new_cache() for _ in trees]
    for cache, job in zip(caches, JOBS[3:6], strict=True):
        target.prefill(job.prompt_ids, cache)
    spans = [Span(*pair) for pair in zip(trees, caches, strict=True)]
    alone = []
    for span in spans:
        alone += target.forward([span])
        span.cache.trim(span.num_past)
    for one, together in zip(alone, target.forward(spans), strict=True):
        assert torch.equal(one.logits, together.logits) and torch.equal(one.hidden, together.hidden)


# -- order, preemption, cancellation ----------------------------------------------------------------------------------


def storm(engine, expected, seed, monkeypatch):
    """Requests come at any time, some are cancelled, rows are short; returns how many were preempted and reused."""
    source = random.Random(seed)
    monkeypatch.setattr(scheduling, "GROWTH", 8)
    monkeypatch.setattr(scheduling, "LEAST_CHUNK", 2)
    monkeypatch.setattr(scheduling, "MOST_CHUNK", 6)
    spare, row_bytes = engine.max_nodes, max(1, engine.row_bytes)
    limits = Limits(
        kv_bytes=row_bytes * (source.choice([150, 200, 260]) + 2 * spare),
        row_bytes=row_bytes,
        max_running=source.choice([1, 3, 6, 9]) if seed else 9,
        spare_rows=spare,
        max_stall_seconds=source.choice([0.1, math.inf]),
        max_waiting=None,
        max_wait_seconds=None,
    )
    ended, counts = {}, {"preempted": 0, "matched": 0, "cancelled": 0}
    scheduler = Scheduler(limits, lambda seconds, running: seconds / 0.02)
    loop = EngineLoop(
        engine, scheduler, publish=lambda batch: ended.update({u.request: u for u in batch if u.state.has_ended})
    )
    plan = scheduler.plan

    def counted(now):
        made = plan(now)
        counts["preempted"] += len(made.preempted)
        counts["matched"] += made.match is not None
        return made

    scheduler.plan = counted
    waiting, tags = source.sample(LONG * 2, 2 * len(LONG)), {}
    while waiting or len(ended) < len(tags):
        for job in [waiting.pop() for _ in range(min(len(waiting), source.randint(0, 4)))]:
            sequence = engine.new_sequence(job.prompt_ids, job.params)
            tags[loop.submit(sequence, namespace=source.choice(["shared"] * 4 + [None]))] = job.tag
        if tags and source.random() < 0.02:
            loop.cancel(source.choice(list(tags)))
        loop.step_once()
        scheduler.check_integrity()
    for request, update in ended.items():
        tokens, reason = expected[tags[request]]
        sequence = request.sequence
        if update.state is State.CANCELLED:
            counts["cancelled"] += 1
            assert sequence.output_ids == tokens[: sequence.num_output]
        else:
            assert update.state is State.FINISHED, update.error
            assert (sequence.output_ids, sequence.finish_reason) == (tokens, reason)
    while scheduler.prefixes.num_bytes:
        scheduler.prefixes.drop_oldest()
    assert scheduler.free_bytes == limits.kv_bytes, "rows are still held"
    return counts


@pytest.mark.parametrize("name", ["none", "amphista-full+lookup", "right"])
def test_any_storm(target, name, monkeypatch):
    expected = plainly(target, LONG)
    drafter = {**real_drafters(target), "right": knowing(expected, jobs=LONG)}[name]
    totals = {"preempted": 0, "matched": 0, "cancelled": 0}
    for seed, tree in enumerate(TREES.values()):
        if (target.path == "stock") == seed % 2:
            continue  # the other half on the other path
        engine = Engine(target, drafter, tree)
        for key, number in storm(engine, expected, seed, monkeypatch).items():
            totals[key] += number
    assert min(totals.values()) >= 1, f"the law would be vacuous: {totals}"


def test_a_chunk_beside_trees_is_one_forward(target, expected):
    """What reads and what decodes in one step, mixed by hand."""
    engine = Engine(target, knowing(expected), parse_tree(6))
    decoding = [begin(engine, job.prompt_ids, job.params) for job in JOBS[3:6]]
    reading = [engine.new_sequence(job.prompt_ids, job.params) for job in JOBS[5:8]]
    for sequence in reading:
        sequence.chunk_len = 4
    batch = [part for pair in zip(decoding, reading, strict=True) for part in pair]
    while batch:
        engine.step(batch)
        batch = [sequence for sequence in batch if not sequence.is_finished]
    for sequence, job in zip([*decoding, *reading], [*JOBS[3:6], *JOBS[5:8]], strict=True):
        assert sequence.output_ids == expected[job.tag][0]


# -- hostile neighbours -----------------------------------------------------------------------------------------------


def test_batches_rest_from_drafts_that_win_nothing(target, expected, monkeypatch):
    """Nothing is looked up then; and it is taken up again."""
    grower = AutoGrower(Costs.measured({1: 1.0, 2: 1.05, 8: 1.2, 24: 1.6}, draft=0.15))
    engine = Engine(target, Proposer(knowing(expected, right=False), use_lookup=True), grower)
    rested, looked, rests, ngrams = [], [], NodeBudget.rests, Proposer.ngrams
    monkeypatch.setattr(NodeBudget, "rests", lambda *given: rested.append(rests(*given)) or rested[-1])
    monkeypatch.setattr(Proposer, "ngrams", lambda *given, **how: looked.append(rested[-1]) or ngrams(*given, **how))
    for _ in range(6):
        assert together(engine, size=8) == expected
    assert True in rested and False in rested[rested.index(True) :]
    assert looked and True not in looked


@pytest.mark.parametrize("path", ["stock", "fast", "native"])
def test_a_neighbour_with_broken_logits_fails_alone(path):
    target = tiny_target(dtype=torch.float32 if path == "native" else torch.float64)
    with torch.no_grad():
        target.model.get_input_embeddings().weight[299] = math.nan
    assert path == "stock" or target.speed_up(native=path == "native")
    if target.path != path:
        pytest.skip(f"no C step here: {target.why_not_native}")
    jobs = [
        dataclasses.replace(job, params=dataclasses.replace(job.params, suppress_tokens=(299,))) for job in JOBS[:6]
    ]
    alone = plainly(target, jobs)
    broken = Job([5, 299, 7], SamplingParams(max_new_tokens=9), "broken")
    late = Job([9] * 40, SamplingParams(max_new_tokens=9, logit_bias={299: 1e9}), "late")
    results = {}
    engine = Engine(target, knowing(alone, jobs=jobs), parse_tree(6))
    for done in Batch(engine, 8).run([broken, *jobs[:3], late, *jobs[3:]]):
        results[done.job.tag] = done.sequence.output_ids, done.sequence.finish_reason, done.error
    for tag, ended in (("broken", []), ("late", [299])):
        tokens, reason, error = results.pop(tag)
        assert tokens == ended and reason is None and isinstance(error, TargetError) and "no finite" in str(error)
    assert {tag: result[:2] for tag, result in results.items()} == alone


def test_one_row_that_fails_stays_as_it_was(target, expected):
    engine = Engine(target, knowing(expected), parse_tree(6))
    sequences = [begin(engine, job.prompt_ids, job.params) for job in (JOBS[0], JOBS[3], JOBS[4])]
    cache = sequences[1].rows.cache
    cache.trim(cache.num_committed - 1)
    sequences[1].rows.draft_state.num_rows += 1
    results = engine.step(sequences)
    assert isinstance(results[1], CapacityError) or results[1].token_ids == []  # a row too few is read again
    while not all(sequence.is_finished for sequence in sequences):
        engine.step([sequence for sequence in sequences if not sequence.is_finished])
    assert [sequence.output_ids for sequence in sequences] == [expected[n][0] for n in (0, 3, 4)]


@pytest.mark.parametrize("tree", ["chain", "7"])
def test_ends_inside_accepted_paths(target, expected, tree):
    """End tokens, limits and the end of the context, each inside a path that is right to its full depth."""
    end = expected[0][0][4]
    stopping = tiny_target(dtype=torch.float64, max_position_embeddings=40)
    stopping.eos_ids = frozenset([end])
    jobs = [dataclasses.replace(job, params=dataclasses.replace(job.params, max_new_tokens=60)) for job in JOBS]
    alone = plainly(stopping, jobs)
    assert {reason for _, reason in alone.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert any(len(job.prompt_ids) + len(alone[job.tag][0]) == 41 for job in jobs)
    engine = Engine(stopping, knowing(alone, jobs=jobs), TREES[tree])
    assert together(engine, jobs, 5) == alone


def test_stop_strings_end_a_row():
    target = tiny_target(with_text=True, dtype=torch.float64)
    free = plainly(target)[0][0]
    stop = target.text.decode(free[:3])
    jobs = [Job(JOBS[0].prompt_ids, SamplingParams(max_new_tokens=24, stop=(stop,)), 0), JOBS[1]]
    results = together(Engine(target, knowing(plainly(target)), parse_tree("chain")), jobs, 2)
    assert results == plainly(target, jobs) and len(results[0][0]) < len(free)


# -- interrupts -------------------------------------------------------------------------------------------------------


def test_a_batched_step_broken_off_has_done_nothing(target, expected, monkeypatch):
    """Ctrl-C when some rows are committed and others not: all of them are as before, and go on."""
    engine = Engine(target, knowing(expected), parse_tree(6))
    sequences = [begin(engine, job.prompt_ids, job.params) for job in (JOBS[0], JOBS[3], JOBS[4], JOBS[5])]
    commit, calls = KVCache.commit, []

    def breaks_off(cache, path):
        calls.append(1)
        if len(calls) in (3, 7, 12):
            raise KeyboardInterrupt
        commit(cache, path)

    monkeypatch.setattr(KVCache, "commit", breaks_off)
    for _ in range(3):
        before = [(list(one.token_ids), one.rows.cache.num_committed, one.stats.num_steps) for one in sequences]
        with pytest.raises(KeyboardInterrupt):
            while True:
                before = [(list(one.token_ids), one.rows.cache.num_committed, one.stats.num_steps) for one in sequences]
                engine.step(sequences)
        assert before == [(one.token_ids, one.rows.cache.num_committed, one.stats.num_steps) for one in sequences]
    monkeypatch.undo()
    while not all(sequence.is_finished for sequence in sequences):
        engine.step([sequence for sequence in sequences if not sequence.is_finished])
    assert [sequence.output_ids for sequence in sequences] == [expected[n][0] for n in (0, 3, 4, 5)]


# -- loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafted", [False, True])
def test_loops_are_cut_where_they_show(drafted):
    """A penalty below 1 favours what was already said, so that a random model loops, too."""
    target = tiny_target(dtype=torch.float64)
    penalties = [0.1, 0.1, 0.5, 1.0]
    jobs = [
        Job([n, n + 50], SamplingParams(max_new_tokens=120, repetition_penalty=penalties[n % 4]), n, cut_loops=True)
        for n in range(12)
    ]
    alone = plainly(target, jobs)
    heads = knowing(alone, jobs=jobs) if drafted else None
    results = together(Engine(target, Proposer(heads, use_lookup=drafted), parse_tree("chain")), jobs, 4)
    looped = 0
    for job in jobs:
        ids, reason = alone[job.tag]
        shown = next((n for n in range(1, len(ids) + 1) if loop_free_length(ids[:n]) < n), None)
        if shown is None or (reason is FinishReason.STOP and shown == len(ids)):
            assert results[job.tag] == (ids, reason)
        else:
            assert results[job.tag] == (ids[: loop_free_length(ids[:shown])], FinishReason.LOOP)
            looped += 1
    assert 3 <= looped < len(jobs), "the law would be vacuous"


# -- turns of one conversation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "amphista-full+lookup"])
def test_what_follows_keeps_its_rows(target, name):
    """Three turns each, in a batch of three: as if every turn had been decoded alone; only what is new is read."""
    turns = {}

    def follow(done):
        name, turn = done.job.tag
        turns[name, turn] = done
        if turn == 2:
            return None
        asked = [*done.job.prompt_ids, *done.sequence.output_ids, 20 + name, 21, 22]
        params = SamplingParams(max_new_tokens=6 + name, temperature=turn * 0.7, seed=turn)
        return Job(asked, params, (name, turn + 1), namespace=name)

    batch = Batch(Engine(target, real_drafters(target)[name], parse_tree(7)), 3)
    first = [Job([5 + n] * (34 + 3 * n), SamplingParams(max_new_tokens=5 + n), (n, 0), namespace=n) for n in range(7)]
    assert len(list(batch.run(first, follow))) == len(turns) == 21
    alone = plainly(target, [done.job for done in turns.values()])
    for tag, done in turns.items():
        assert (done.sequence.output_ids, done.sequence.finish_reason) == alone[tag]
    later = [done.sequence.stats for (_, turn), done in turns.items() if turn]
    assert all(stats.num_cached_tokens > 0.7 * stats.num_prompt_tokens for stats in later)


def test_a_run_can_be_broken_off_and_another_one_started(target, expected):
    engine = Engine(target, Proposer(use_lookup=True), parse_tree(5))
    running = Batch(engine, 3).run(JOBS)
    next(running)
    running.close()
    assert together(engine, JOBS[::-1], 3) == expected


def test_unusable_requests_are_refused(target):
    engine = Engine(target, Proposer(), parse_tree(1))
    with pytest.raises(ConfigError, match="a batch of 0"):
        Batch(engine, 0)
    with pytest.raises(RequestError, match="empty"):
        list(Batch(engine, 2).run([Job([], SamplingParams(), 0)]))
    with pytest.raises(CapacityError, match="take a smaller batch_size or max_tokens"):
        Batch(engine, 4, kv_bytes=100 * engine.row_bytes).check_memory(JOBS)
    Batch(engine, 1, kv_bytes=100 * engine.row_bytes).check_memory(JOBS)


# -- mutations --------------------------------------------------------------------------------------------------------


def is_seen(target, expected):
    """Whether the check above finds fault; a wrong graft makes accepted paths lie apart in the tree. So is a step of
    several that fails: each is repeated alone then, where there are no neighbours."""
    engine, failed = Engine(target, knowing(expected), parse_tree(9)), []
    inner = engine._step

    def watched(batch):
        try:
            return inner(batch)
        except Exception:
            failed.append(len(batch))
            raise

    engine._step = watched
    try:
        return together(engine, size=4) != expected or bool(failed)
    except (CapacityError, TargetError, RuntimeError, AssertionError):
        return True


def _neighbours_cache(monkeypatch):
    class Wrong:
        def __init__(self, own, other):
            self._own, self._other = own, other

        def append(self, keys, values):
            found = self._own.append(keys, values)
            size = found[0].shape[2]
            if self._other.keys is None or self._other.capacity < size:
                return found
            return self._other.keys.narrow(2, 0, size), self._other.values.narrow(2, 0, size)

    mixed = lean._mixed
    monkeypatch.setattr(
        lean,
        "_mixed",
        lambda attention, projected, caches, *more: mixed(
            attention, projected, [Wrong(*pair) for pair in zip(caches, [*caches[1:], caches[0]], strict=True)], *more
        ),
    )
    of_all = Layout.of_all.__func__

    def all_but_own(cls, spans, device):
        layout = of_all(cls, spans, device)
        if len(spans) > 1:
            layout.visible[0, 0, -1] = True
        return layout

    monkeypatch.setattr(Layout, "of_all", classmethod(all_but_own))


def _positions_by_row(monkeypatch):
    monkeypatch.setattr(
        Span, "positions", property(lambda span: list(range(span.num_past, span.num_past + span.tree.num_nodes)))
    )


def _unmoved_path(monkeypatch):
    monkeypatch.setattr(KVCache, "_move", lambda cache, source, to: None)


def _stale_length(monkeypatch):
    commit = KVCache.commit

    def stale(cache, path):
        commit(cache, path)
        if len(path) > 1 and cache.num_committed > 40:
            cache.trim(cache.num_committed - 1)

    monkeypatch.setattr(KVCache, "commit", stale)


@pytest.mark.parametrize("mutation", [_neighbours_cache, _positions_by_row, _unmoved_path, _stale_length])
def test_a_mutation_is_seen(target, expected, mutation, monkeypatch):
    assert not is_seen(target, expected)
    mutation(monkeypatch)
    if mutation is _stale_length:
        with pytest.raises(CapacityError, match="rows are cached"):
            sequence = begin(Engine(target, Proposer(), parse_tree(1)), [5] * 39, SamplingParams(max_new_tokens=9))
            sequence.rows.cache.trim(sequence.rows.cache.num_committed - 1)
            sequence.rows.cache.layers[0].num_rows += 1
            step(Engine(target, Proposer(), parse_tree(1)), sequence)
    else:
        assert is_seen(target, expected)
