"""Drafting in fixed shapes (drafter/captured_drafter.py) equals the drafter as it is; decoding so is lossless.

Here the functions that CUDA records run as they are, on the same buffers; tests/gpu repeats the checks under capture.
Mutations (padding that writes among the rows, the features of another row, rows left behind when a state moves) must be
seen.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from amphista.drafter import captured_drafter as drafting
from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.drafter.base import Calibration
from amphista.drafter.captured_drafter import AskRegion, CapturedDrafter, FeedRegion
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.drafter.proposer import Proposer
from amphista.drafter.stage_buffer import StageBuffer
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.step import Engine
from amphista.errors import CaptureError
from amphista.kernels.graph import Recorder
from amphista.llm import LLM
from amphista.target import captured_forward as verifying
from amphista.target.spec import LogitTransform, SharedWeights
from amphista.target.target import Target
from amphista.tree.grow import parse_tree
from tests.capturable import buffers_of, capturable
from tests.decoding import begin, decode, step
from tests.oracle.decode import decode_plainly
from tests.tiny import (
    AMPHISTA_SWITCHES,
    AUTO_TREES,
    EOS,
    GRAFTS,
    HOSTILE,
    REAL_DRAFTERS,
    SEQUENTIAL,
    Grafting,
    anew,
    byte_tokenizer,
    real_drafters,
    tiny_model,
)

PROMPT = [5, 17, 230, 44, 9]
PARALLEL = [name for name in REAL_DRAFTERS if name not in ("none", *SEQUENTIAL) and "+" not in name]
TREES = {"1": parse_tree(1), "9": parse_tree(9), "chain": parse_tree("chain"), **AUTO_TREES}
SAMPLINGS = {
    "greedy": SamplingParams(max_new_tokens=24),
    "sampled": SamplingParams(max_new_tokens=24, temperature=0.7, seed=3),
    "penalised": SamplingParams(max_new_tokens=24, repetition_penalty=1.5),
}


@pytest.fixture(autouse=True)
def _small_capacities(monkeypatch):
    """So that a short answer crosses several."""
    monkeypatch.setattr(verifying, "FIRST_CAPACITY", 16)
    monkeypatch.setattr(drafting, "FIRST_CAPACITY", 8)


def static_target(family="llama", dtype=torch.float32, text=None, **changes):
    target = Target(tiny_model(family, dtype=dtype, **changes), text, static=True)
    assert target.speed_up() and target.is_static, target.why_not_captured
    return target


@pytest.fixture(scope="module")
def target():
    return static_target()


@pytest.fixture(scope="module")
def exact():
    return static_target(dtype=torch.float64)


@pytest.fixture(scope="module")
def drafters(target):
    return real_drafters(target)


@pytest.fixture(scope="module")
def expected(target):
    return {name: decode_plainly(target.model, PROMPT, params, {EOS}) for name, params in SAMPLINGS.items()}


# -- the same candidates ----------------------------------------------------------------------------------------------


def history(target, num_rows=60, taps=()):
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(num_rows, target.spec.row_width(taps), generator=generator, dtype=target.dtype)
    return hidden, torch.randint(target.spec.vocab_size, (num_rows,), generator=generator)


def worst_offer(drafter, target, num_ranks=6) -> float:
    """Feeding in pieces of many sizes, asking between them, trims, and rows left by a feeding that broke off."""
    hidden, ids = history(target, taps=drafter.taps)
    pair = [CapturedDrafter(drafter), drafter]
    states = [drafter.start() for _ in pair]
    worst, at = 0.0, 0
    for size, keep in ((1, 99), (5, 99), (3, 7), (2, 99), (33, 20), (1, 99), (4, 99), (7, 3), (9, 99)):
        for each, state in zip(pair, states, strict=True):
            each.commit(state, hidden[at : at + size], ids[at : at + size])
        for depth in (None, 2):
            ours, theirs = (each.draft(state, num_ranks, depth) for each, state in zip(pair, states, strict=True))
            if ours.tokens != theirs.tokens:
                return 1.0
            for mine, other in zip(ours.log_probs, theirs.log_probs, strict=True):
                worst = max(worst, *(abs(a - b) for a, b in zip(mine, other, strict=True)))
            if ours.below is not None:
                worst = max(worst, float(np.abs(np.subtract(ours.below.log_probs, theirs.below.log_probs)).max()))
        at = (at + size) % 20
        if keep < 99:
            for each, state in zip(pair, states, strict=True):
                each.trim(state, keep)
            for cache in states[0].caches:
                cache.num_rows += 1
    assert states[0].num_rows == states[1].num_rows
    return worst


@pytest.mark.parametrize("name", PARALLEL)
def test_the_same_candidates(exact, name):
    assert worst_offer(real_drafters(exact)[name], exact) < 1e-5  # log-probabilities are of float32


def test_with_a_calibration(exact):
    drafter = real_drafters(exact)["amphista-draft-vocabulary"]
    drafter.calibration = Calibration(greedy=[1.1, 1.2, 1.3, 1.4, 1.5], sampled=[0.9, 1.0, 1.1, 1.2, 1.3], coverage=0.8)
    assert worst_offer(drafter, exact) < 1e-5
    around = CapturedDrafter(drafter)
    state, (hidden, ids) = drafter.start(), history(exact, taps=drafter.taps)
    around.commit(state, hidden[:3], ids[:3])
    before = around.draft(state, 4)
    drafter.calibration = Calibration(greedy=[2.0] * 5, sampled=[1.0] * 5, coverage=0.5)
    after, theirs = around.draft(state, 4), drafter.draft(state, 4)
    assert after.log_probs != before.log_probs
    assert after.log_probs[0] == pytest.approx(theirs.log_probs[0], abs=1e-5)


def test_states_take_turns(exact):
    """Rows and features of one move out when another is fed or asked, and are the same when it comes back."""
    for name in ("amphista-full", "amphista-one-stage", "amphista-no-stages", "medusa-shared", "medusa-paths"):
        drafter = real_drafters(exact)[name]
        around, (hidden, ids) = CapturedDrafter(drafter), history(exact)
        pairs = [(drafter.start(), drafter.start()) for _ in range(3)]
        for turn in range(3):
            for shift, (ours, theirs) in enumerate(pairs):
                rows = slice(10 * shift + turn, 10 * shift + turn + 2)
                around.commit(ours, hidden[rows], ids[rows]), drafter.commit(theirs, hidden[rows], ids[rows])
            for mine, other in [(around.draft(ours, 5), drafter.draft(theirs, 5)) for ours, theirs in pairs]:
                assert mine.tokens == other.tokens and (mine.below is None) == (drafter.path is None)
                if mine.below is not None:
                    np.testing.assert_allclose(mine.below.log_probs, other.below.log_probs, atol=1e-5)


def test_recording_leaves_the_features_of_others(exact, monkeypatch):
    """A recording runs what it records: what was fed before and is asked after it must not be overwritten."""
    drafter = real_drafters(exact)["amphista-full"]
    around, (hidden, ids) = CapturedDrafter(drafter), history(exact)
    monkeypatch.setattr(Recorder, "record", lambda recorder, run: (run(), run)[1])
    for record in (lambda: around.commit(around.start(), hidden[:6], ids[:6]), lambda: around.prepare(5, 40)):
        state, other = drafter.start(), drafter.start()
        around.commit(state, hidden[5:6], ids[5:6]), drafter.commit(other, hidden[5:6], ids[5:6])
        record()
        assert around.draft(state, 5).tokens == drafter.draft(other, 5).tokens


def test_another_thread_goes_on_with_a_state(exact):
    drafter = real_drafters(exact)["amphista-full"]
    around, (hidden, ids) = CapturedDrafter(drafter), history(exact)
    state, other = drafter.start(), drafter.start()
    around.commit(state, hidden[:5], ids[:5]), drafter.commit(other, hidden[:5], ids[:5])
    found = []

    def elsewhere():
        found.append(around.draft(state, 5).tokens)
        around.commit(state, hidden[5:7], ids[5:7])
        found.append(around.draft(state, 5).tokens)

    thread = threading.Thread(target=elsewhere)
    thread.start(), thread.join()
    assert found[0] == drafter.draft(other, 5).tokens
    drafter.commit(other, hidden[5:7], ids[5:7])
    assert found[1] == drafter.draft(other, 5).tokens
    assert any(buffer.holds(state) for buffer in around._stage_buffers.values())
    around.commit(state, hidden[7:9], ids[7:9]), drafter.commit(other, hidden[7:9], ids[7:9])
    assert around.draft(state, 5).tokens == drafter.draft(other, 5).tokens


@pytest.mark.parametrize("name", PARALLEL)
def test_drafting_asks_the_host_for_nothing_and_its_buffers_stay(target, drafters, name):
    around, (hidden, ids) = CapturedDrafter(drafters[name]), history(target, taps=drafters[name].taps)
    state = around.start()
    addresses = {}
    for size in (1, 3, 1, 6, 4, 8, 3):
        around.commit(state, hidden[:size], ids[:size])
        around.draft(state, 6)
        for kept in (around._feeds._kept, around._asks._kept):
            for key, (region, _) in kept.items():
                assert addresses.setdefault((type(region), key), buffers_of(region)) == buffers_of(region)
    regions = [region for kept in (around._feeds._kept, around._asks._kept) for region, _ in kept.values()]
    assert {type(region) for region in regions} == ({FeedRegion, AskRegion} if state.caches else {AskRegion})
    for region in regions:
        with capturable() as watch:
            region.run()
        assert len(watch.names) > 5


@pytest.mark.parametrize("kind, switches", [*((Amphista, s) for s in AMPHISTA_SWITCHES.values()), (Medusa, {})])
def test_everything_it_touches_is_on_its_device(target, kind, switches):
    """On `meta`, which holds no values and joins no other device, as CUDA does not; bfloat16, as there."""
    meta, spec = torch.device("meta"), target.spec
    config = (AmphistaConfig if kind is Amphista else MedusaConfig)(**switches)
    with meta:
        embedding, head = torch.nn.Embedding(spec.vocab_size, 32), torch.nn.Linear(32, spec.vocab_size, bias=False)
        shared = SharedWeights(embedding.bfloat16(), head.bfloat16(), LogitTransform())
        heads = kind(config, spec, shared).bfloat16().freeze()
    around = CapturedDrafter(heads)
    with torch.inference_mode():
        regions = [AskRegion(heads, around._features, around._pending, around._divisors, 6)]
        if kind is Amphista and config.stages:
            regions.append(FeedRegion(heads, StageBuffer(heads, 16), around._features, 4))
        for region in regions:
            region.run()
    assert regions[0].offers.device == meta


def test_a_device_that_cannot_record_drafts_on_without(target, drafters, monkeypatch):
    around, (hidden, ids) = CapturedDrafter(drafters["amphista-full"]), history(target)
    state, other = around.start(), around.start()
    around.commit(state, hidden[:3], ids[:3]), drafters["amphista-full"].commit(other, hidden[:3], ids[:3])

    def refuse(recorder, run):
        raise CaptureError("out of memory")

    monkeypatch.setattr(Recorder, "record", refuse)
    with pytest.warns(RuntimeWarning, match="amphista drafts without captured graphs, slower: out of memory") as seen:
        for rows in (slice(3, 8), slice(8, 9)):
            (
                around.commit(state, hidden[rows], ids[rows]),
                drafters["amphista-full"].commit(other, hidden[rows], ids[rows]),
            )
            assert around.draft(state, 4).tokens == drafters["amphista-full"].draft(other, 4).tokens
    assert len(seen) == 1 and around.why_not_captured == "out of memory"


# -- the same tokens --------------------------------------------------------------------------------------------------


def check(target, drafter, tree, sampling, expected):
    engine = Engine(target, drafter, TREES[tree])
    sequence = decode(engine, PROMPT, SAMPLINGS[sampling])
    assert sequence.output_ids == expected[sampling]
    cache = sequence.rows.cache
    cache.check_integrity()
    assert cache.num_committed == len(PROMPT) + sequence.stats.num_tokens - 1
    assert cache.buffer is not None and cache.buffer.holds(cache), "nothing ran in fixed shapes"
    return sequence, engine


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_drafters(target, expected, name, tree, sampling):
    sequence, _ = check(target, HOSTILE[name](PROMPT + expected[sampling]), tree, sampling, expected)
    accepted = sequence.stats.accepted
    if name == "always-right" and tree == "chain":
        assert set(accepted[:-1]) == {4}
    if name == "always-wrong":
        assert set(accepted) == {0}


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
@pytest.mark.parametrize("tree", ["chain", "9", *AUTO_TREES])
@pytest.mark.parametrize("name", [name for name in REAL_DRAFTERS if name not in SEQUENTIAL[1:]])
def test_real_drafters(target, drafters, expected, name, tree, sampling):
    _, engine = check(target, drafters[name], tree, sampling, expected)
    assert isinstance(engine._heads, CapturedDrafter) == (not name.startswith(("none", "hydra", "eagle")))


@pytest.mark.parametrize("graft", GRAFTS)
@pytest.mark.parametrize("inner", ["none", "amphista-full"])
def test_grafts(target, drafters, expected, inner, graft):
    """Steps that skip the heads, and rows fed late, several at once."""
    drafter = Grafting(Proposer.of(drafters[inner]).heads, PROMPT + expected["greedy"], GRAFTS[graft])
    for tree in ("9", *AUTO_TREES):
        check(target, drafter, tree, "greedy", expected)


@pytest.mark.parametrize("family", ["mistral-windowed", "qwen2-windowed", "qwen3"])
def test_other_families(family):
    target = static_target(family)
    drafters = real_drafters(target)
    for params in SAMPLINGS.values():
        expected = decode_plainly(target.model, PROMPT, params, {EOS})
        for name in ("none", "amphista-full", "medusa-shared", "amphista-full+lookup"):
            assert decode(Engine(target, drafters[name], parse_tree(9)), PROMPT, params).output_ids == expected


def test_the_same_steps_as_in_ordinary_shapes(drafters, target):
    """Not the tokens alone: what is accepted and expected of each tree."""
    plain = Target(tiny_model())
    assert plain.speed_up() and not plain.is_static
    for name in ("amphista-full", "medusa-shared", "amphista-full+lookup"):
        for tree in ("9", "auto-dear"):
            ours, theirs = (
                decode(Engine(either, drafters[name], anew(TREES[tree])), PROMPT, SAMPLINGS["sampled"])
                for either in (target, plain)
            )
            assert ours.stats.accepted == theirs.stats.accepted and ours.stats.drafted == theirs.stats.drafted
            assert ours.stats.expected == pytest.approx(theirs.stats.expected, abs=1e-4)


@pytest.mark.parametrize("name", ["none", "always-right", "random"])
def test_context_end_is_a_length_finish(name):
    small = static_target(max_position_embeddings=20)
    params = SamplingParams(max_new_tokens=100)
    expected = decode_plainly(small.model, PROMPT, params)
    small.__dict__["eos_ids"] = frozenset()
    drafter = Proposer() if name == "none" else HOSTILE[name](PROMPT + expected)
    sequence = decode(Engine(small, drafter, parse_tree(12)), PROMPT, params)
    assert sequence.output_ids == expected and sequence.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("name", ["none", "amphista-full", "medusa-shared", "amphista-full+lookup"])
def test_next_turn_equals_fresh_prefill(name):
    from amphista.target.text import Text

    target = static_target(text=Text(byte_tokenizer()))
    llm = LLM(target, real_drafters(target)[name], tree=7)
    kept, reused = llm.conversation(), 0
    params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=5)
    for message in ("Hello there", "And then?", "Überäll"):
        prompt = llm.prompt_ids([*kept.messages, {"role": "user", "content": message}])
        fresh = decode(llm.engine, prompt, params)
        answer = kept.send(message, params=params)
        assert answer.token_ids == fresh.output_ids and answer.stats.accepted == fresh.stats.accepted
        reused += answer.stats.num_cached_tokens
    assert reused > 20


def test_conversations_interleave(target, drafters, expected):
    """Two requests of one engine, step by step in turn."""
    engine = Engine(target, Proposer(drafters["amphista-full"], use_lookup=True), parse_tree(9))
    other_prompt = [9, 8, 7]
    other = decode_plainly(target.model, other_prompt, SAMPLINGS["greedy"], {EOS})
    first = begin(engine, PROMPT, SAMPLINGS["greedy"])
    second = begin(engine, other_prompt, SAMPLINGS["greedy"])
    while first.finish_reason is None or second.finish_reason is None:
        for sequence in (first, second):
            if sequence.finish_reason is None:
                step(engine, sequence)
    assert (first.output_ids, second.output_ids) == (expected["greedy"], other)


# -- what must not pass -----------------------------------------------------------------------------------------------


def _padding_written_among_the_rows(monkeypatch):
    original = FeedRegion.load

    def load(region, hidden, next_ids, num_past):
        original(region, hidden, next_ids, num_past)
        region.slots[len(next_ids) :] = 0

    monkeypatch.setattr(FeedRegion, "load", load)


def _features_of_the_first_row(monkeypatch):
    original = FeedRegion.load

    def load(region, hidden, next_ids, num_past):
        original(region, hidden, next_ids, num_past)
        region.last.zero_()

    monkeypatch.setattr(FeedRegion, "load", load)


def _positions_from_zero(monkeypatch):
    original = FeedRegion.load

    def load(region, hidden, next_ids, num_past):
        original(region, hidden, next_ids, num_past)
        region.positions[: len(next_ids)] -= num_past

    monkeypatch.setattr(FeedRegion, "load", load)


def _rows_left_behind(monkeypatch):
    def attach(buffer, state):
        for cache, view in zip(state.caches, buffer.views, strict=True):
            cache._kv = view

    monkeypatch.setattr(StageBuffer, "attach", attach)


def _features_not_handed_over(monkeypatch):
    monkeypatch.setattr(CapturedDrafter, "_take_buffers", lambda around, state: None)


MUTATIONS = [_padding_written_among_the_rows, _features_of_the_first_row, _positions_from_zero, _rows_left_behind]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_seen(mutation, exact, monkeypatch):
    drafter = real_drafters(exact)["amphista-full"]
    with monkeypatch.context() as patch:
        mutation(patch)
        assert worst_offer(drafter, exact) > 1e-3
    assert worst_offer(drafter, exact) < 1e-5


def test_features_not_handed_over_are_seen(exact, monkeypatch):
    _features_not_handed_over(monkeypatch)
    with pytest.raises(AssertionError):
        test_states_take_turns(exact)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["none", "amphista-full", "medusa-shared", "amphista-full+lookup"])
def test_nothing_is_recorded_in_mid_answer_once_prepared(drafters, name, tree):
    """So that a measurement holds no capture."""
    target = static_target()
    engine = Engine(target, real_drafters(target)[name], TREES[tree])
    engine.prepare(len(PROMPT) + 24)

    def recorded():
        around = engine._heads
        kept = [target._captured._regions._kept]
        kept += [around._feeds._kept, around._asks._kept] if isinstance(around, CapturedDrafter) else []
        return {(index, key) for index, regions in enumerate(kept) for key in regions}

    before = recorded()
    decode(engine, PROMPT, SAMPLINGS["greedy"])
    assert recorded() == before and len(before) > 1
