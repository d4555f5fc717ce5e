"""Drafting in C: what the torch form says; the same bits however sequences are batched and their rows cut into calls.

Every drafter with every switch, on random weights. The faults that the library can be built with must be seen.
"""

from __future__ import annotations

import copy
import ctypes
import math
import random
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from amphista.drafter import native_drafter
from amphista.drafter.base import Ask, Calibration
from amphista.drafter.heads import ParallelHeads
from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.errors import NativeError
from amphista.native.build import load
from amphista.native.drafting import NativeHeads
from amphista.tree.candidates import Candidates
from amphista.tree.grow import parse_tree
from tests.decoding import begin, decode, step
from tests.laws.test_batch import TREES, plainly, together
from tests.laws.test_feeding import Seldom
from tests.laws.test_native import FAULTS, FLAGS, NEEDS_COMPILER, mutable, runs_here  # noqa: F401
from tests.tiny import REAL_DRAFTERS, SEQUENTIAL, anew, real_drafters, tiny_target

HEADS = [name for name in REAL_DRAFTERS if name not in ("none", *SEQUENTIAL) and "+" not in name]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_ROWS = 40
ODD = {"hidden_size": 36, "intermediate_size": 50, "head_dim": 10, "vocab_size": 301}  # of no whole vectors

pytestmark = NEEDS_COMPILER


@pytest.fixture
def two_threads(monkeypatch):
    """In C alone: torch's would only wait for each other."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@cache
def drafters(type_name: str = "float32") -> dict[str, ParallelHeads]:
    target = tiny_target(dtype=TYPES[type_name], **ODD)
    some = real_drafters(target, seed=2)  # with 1 two tokens are as likely but for rounding
    return {name: drafter for name, drafter in some.items() if name in HEADS}


def in_c(name: str, type_name: str = "float32", *, exact: bool = True, flags=None) -> ParallelHeads:
    drafter = copy.deepcopy(drafters(type_name)[name])
    with pytest.MonkeyPatch.context() as patch:
        if flags is not None:
            patch.setattr(native_drafter, "NativeHeads", lambda parts, **given: NativeHeads(parts, flags=flags))
        drafter.freeze(native=True, exact=exact)
    assert drafter.why_not_native is None
    return drafter


def history(drafter: ParallelHeads, seed: int = 0) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(NUM_ROWS, drafter.spec.row_width(drafter.taps), generator=generator)
    return hidden.to(drafter.dtype), torch.randint(300, (NUM_ROWS,), generator=generator).tolist()


def drafted(drafter: ParallelHeads, cuts: list[int], num_ranks: int = 5, depth: int = 9):
    """What is said behind rows that were fed in these pieces, the last of them with the question."""
    hidden, ids = history(drafter)
    state = drafter.start()
    *before, (start, end) = pairwise([0, *cuts])
    for first, last in before:
        drafter.commit(state, hidden[first:last], torch.tensor(ids[first:last]))
    ask = Ask(state, depth, hidden[start:end], ids[start:end])
    return drafter.draft_all([ask], num_ranks)[0]


def distance(ours: Candidates, theirs: Candidates) -> float:
    """The largest difference of log-probabilities; infinite where tokens or their order differ."""
    if ours.tokens != theirs.tokens or (ours.below is None) != (theirs.below is None):
        return math.inf
    parts = [(ours.log_probs, theirs.log_probs)]
    if ours.below is not None and theirs.below is not None:
        if not np.array_equal(ours.below.ranks, theirs.below.ranks):
            return math.inf
        parts.append((ours.below.log_probs, theirs.below.log_probs))
    return max(float((torch.tensor(mine) - torch.tensor(other)).abs().max()) for mine, other in parts)


def named(drafted: Candidates) -> dict[tuple[int, ...], float]:
    """Log-probabilities by depth, token above where paths are known, and token."""
    found = {}
    for depth, ranked in enumerate(zip(drafted.tokens, drafted.log_probs, strict=True)):
        found |= {(depth, token): value for token, value in zip(*ranked, strict=True)}
    if drafted.below is not None:
        for depth, rows in enumerate(zip(drafted.below.ranks, drafted.below.log_probs, strict=True)):
            for place, row in enumerate(zip(*rows, strict=True)):
                for rank, value in zip(*row, strict=True):
                    found[depth, drafted.tokens[depth][place], drafted.tokens[depth + 1][rank]] = value
    return found


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("family", ["gemma3", "granite", "gemma2"])
def test_what_the_torch_form_says_for_scaled_embeddings_and_logits(family, name):
    """Heads that know paths are asked in torch where logits are scaled or capped."""
    target = tiny_target(family, tie_word_embeddings=False)
    with torch.no_grad():
        target.model.get_input_embeddings().weight.mul_(1e-3)  # a norm's eps tells what they are multiplied by
    theirs = real_drafters(target, seed=2)[name]
    ours = copy.deepcopy(theirs)
    ours.freeze(native=True, exact=True)
    assert (ours.why_not_native is None) == (family == "gemma3" or ours.path is None)
    given = {"cuts": [3, 4, 9]}
    assert distance(drafted(ours, **given), drafted(theirs, **given)) < 2e-3
    assert min(drafted(ours, **given).log_probs[0]) < -1


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", HEADS)
def test_what_the_torch_form_says(name, flags):
    """Less deep or deeper than heads go, with more ranks than there are tokens."""
    if not runs_here(flags):
        pytest.skip("this processor has no AVX2")
    ours, theirs = in_c(name, flags=FLAGS[flags]), drafters()[name]
    for settings in ({}, {"depth": 2}, {"depth": 1}, {"num_ranks": 8}):
        given = {"cuts": [3, 4, 9], **settings}
        assert distance(drafted(ours, **given), drafted(theirs, **given)) < 2e-4
    (everything, *_), (known, *_) = (drafted(one, [9], num_ranks=999).tokens for one in (ours, theirs))
    assert sorted(everything) == sorted(known)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", [name for name in HEADS if "paths" in name])
def test_a_move_beyond_any_exponential_is_a_probability(monkeypatch, name):
    """What a token above moves a score by may be larger than 88, where e to the power of it is no float32."""
    far = copy.deepcopy(drafters()[name])
    with torch.no_grad():
        far.path.output.weight.mul_(100)
    monkeypatch.setitem(drafters("float32"), name, far)  # a cache of its own
    ours, theirs = (named(drafted(form, [9])) for form in (in_c(name), far))
    assert all(math.isfinite(value) for value in ours.values())
    both = ours.keys() & theirs.keys()
    assert len(both) > 0.9 * len(ours) and min(theirs.values()) < -88
    assert max(abs(ours[where] - theirs[where]) for where in both) < 2e-5 * -min(theirs.values())


@pytest.mark.parametrize("name", HEADS)
def test_with_a_calibration(name):
    ours, theirs = in_c(name), copy.deepcopy(drafters()[name])
    number = theirs.num_heads
    calibration = Calibration(greedy=[1.5 - 0.1 * k for k in range(number)], sampled=[2.0] * number, coverage=0.8)
    ours.calibration = theirs.calibration = calibration
    assert distance(*(drafted(one, [5]) for one in (ours, theirs))) < 2e-4


@pytest.mark.parametrize("name", HEADS)
def test_weights_of_few_bits_stay_close(name):
    """Of bfloat16, and of 8 bits, which is what decodes: most of what they offer is what float32 offers."""
    expected = drafted(drafters()[name], [9], num_ranks=12)
    for type_name, exact in (("bfloat16", True), ("bfloat16", False), ("float32", False)):
        found = drafted(in_c(name, type_name, exact=exact), [9], num_ranks=12)
        shared = [len({*ours} & {*theirs}) for ours, theirs in zip(found.tokens, expected.tokens, strict=True)]
        assert sum(shared) >= 0.7 * sum(map(len, expected.tokens)), shared


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_the_same_bits_in_any_batch_and_in_any_pieces(name, exact):
    """Sequences of many lengths, fed with the question and before it, some asked twice, in one call and alone; of some
    more hidden states are given than tokens."""
    drafter, source = in_c(name, exact=exact), random.Random(len(name))
    asks, alone = [], []
    for number in range(7):
        hidden, ids = history(drafter, number)
        end = source.randrange(1, NUM_ROWS)
        cut, state = source.randrange(end + 1), drafter.start()
        depth = source.randrange(1, drafter.num_heads + 1)
        if cut:
            drafter.commit(state, hidden[:cut], torch.tensor(ids[:cut]))
        asks.append(Ask(state, depth, hidden[cut : end + number % 3] if cut < end else None, ids[cut:end]))
        alone.append(Ask(drafter.start(), depth, hidden[: end + number % 2], ids[:end]))
    expected = [drafter.draft_all([ask], 6)[0] for ask in alone]
    assert drafter.draft_all(asks, 6) == expected
    again = [Ask(ask.state, ask.max_depth) for ask in asks]
    assert drafter.draft_all(again[::-1], 6) == expected[::-1]


@pytest.mark.parametrize("name", ["amphista-full", "amphista-own-paths", "medusa-paths"])
def test_the_number_of_threads_changes_no_bit(name, monkeypatch):
    drafter, found = in_c(name), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(drafted(drafter, [7, 8, 11]))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["amphista-full", "amphista-one-stage", "amphista-no-stages", "medusa-paths"])
def test_trimmed_and_copied_rows_leave_no_trace(name):
    drafter = in_c(name)
    hidden, ids = history(drafter)
    next_ids, state = torch.tensor(ids), drafter.start()
    drafter.commit(state, hidden[:4], next_ids[:4])
    drafter.commit(state, hidden[:9] * -1, next_ids[:9])
    drafter.trim(state, 4)
    copied = drafter.copy(state, 3)
    assert copied.num_rows == 3 and copied.caches[0].num_bytes <= state.caches[0].num_bytes
    drafter.commit(state, hidden[4:20], next_ids[4:20])
    drafter.commit(copied, hidden[3:20], next_ids[3:20])
    expected = drafted(drafter, [20])
    assert drafter.draft(state, 5) == drafter.draft(copied, 5) == expected


@pytest.mark.parametrize("name", ["amphista-full", "amphista-paths", "amphista-own-head", "medusa-paths"])
@pytest.mark.parametrize("number", [math.nan, math.inf, 1e38])
def test_weights_that_are_no_numbers_cost_drafts_alone(name, number):
    target = tiny_target()
    heads = real_drafters(target)[name]
    with torch.no_grad():
        for weight in heads.parameters():
            weight.view(-1)[::7] = number
    heads.freeze(native=True)
    state = heads.start()
    heads.commit(state, torch.randn(3, 32), torch.arange(3))
    for tokens in heads.draft(state, 8).tokens:
        assert len({*tokens}) == len(tokens) and all(0 <= token < 300 for token in tokens)
    params = SamplingParams(max_new_tokens=20)
    expected = decode(Engine(target, Proposer(), parse_tree(1)), [5, 6, 7], params).output_ids
    assert decode(Engine(target, heads, parse_tree(12)), [5, 6, 7], params).output_ids == expected


@pytest.mark.parametrize("fault", ["skipped ancestor", "late position", "dropped tail", "dropped odd", "other cache"])
def test_a_fault_is_seen(mutable, fault):  # noqa: F811
    flags, switch = mutable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_drafter, "NativeHeads", lambda parts, **given: NativeHeads(parts, flags=flags))
        drafter = in_c("amphista-full")
    expected = drafted(drafters()["amphista-full"], [3, 8, 13])
    other = Ask(drafter.start(), 5, *(part[:2] for part in history(drafter, 5)))

    def found() -> float:
        hidden, ids = history(drafter)
        state = drafter.start()
        drafter.commit(state, hidden[:8], torch.tensor(ids[:8]))
        drafter.trim(other.state, 0)
        together = drafter.draft_all([Ask(state, 5, hidden[8:13], ids[8:13]), other], 5)
        return distance(together[0], expected)

    assert found() < 2e-4
    switch.value = FAULTS.index(fault) + 1
    try:
        far = found()
    finally:
        switch.value = 0
    assert far > 1e-3


def test_what_cannot_be_is_refused_and_nothing_read():
    drafter = in_c("amphista-full")
    state = drafter.start()
    with pytest.raises(NativeError, match="outside the vocabulary"):
        drafter.commit(state, torch.zeros(2, 36), torch.tensor([1, 301]))
    assert state.num_rows == 0


def test_records_of_another_size_are_refused(monkeypatch):
    monkeypatch.setattr("amphista.native.drafting._Stage", ctypes.c_int64)
    with pytest.raises(NativeError, match="records"):
        drafter = copy.deepcopy(drafters()["amphista-full"])
        native_drafter.NativeDrafter(drafter.parts(), drafter._scores(), None, 0)


def test_without_a_compiler_the_torch_form_drafts_and_a_line_says_why(monkeypatch, caplog):
    expected = drafted(drafters()["amphista-full"], [5])
    drafter = copy.deepcopy(drafters()["amphista-full"])
    monkeypatch.setenv("CC", "never-installed-cc")
    monkeypatch.setenv("AMPHISTA_CACHE", "/nowhere")
    load.cache_clear()
    with caplog.at_level("WARNING", "amphista"):
        drafter.freeze(native=True)
    load.cache_clear()
    assert "never-installed-cc" in drafter.why_not_native
    assert [record.getMessage() for record in caplog.records] == [
        f"amphista drafts without the C step, slower: {drafter.why_not_native}"
    ]
    assert distance(drafted(drafter, [5]), expected) < 1e-5


# -- in service -------------------------------------------------------------------------------------------------------


@cache
def native_target():
    target = tiny_target()
    assert target.speed_up(native=True) and target.is_native
    return target


def frozen(name: str) -> ParallelHeads:
    drafter = real_drafters(native_target())[name].freeze(native=True)
    assert drafter.why_not_native is None
    return drafter


@pytest.mark.parametrize("grower", [parse_tree(12), Seldom(12)], ids=["always", "seldom"])
@pytest.mark.parametrize("name", ["amphista-full", "amphista-paths", "amphista-no-stages", "medusa-paths"])
def test_what_is_drafted_in_service_is_what_a_fresh_drafter_says(name, grower):
    """To the bit, after every step, the second request rewinding into the first: heads were given the right rows."""
    target, drafter = native_target(), frozen(name)
    engine, sequence, looked = Engine(target, drafter, grower), None, 0
    for prompt in ([5, 17, 230, 44, 9, 61, 3, 4], [5, 17, 230, 44, 80, 81, 82, 83, 84]):
        sequence = begin(engine, prompt, SamplingParams(max_new_tokens=30, ignore_eos=True), sequence)
        while not sequence.is_finished:
            step(engine, sequence)
            if sequence.stats.num_steps % 3:
                continue
            ids, fresh = sequence.token_ids, drafter.start()
            drafter.commit(fresh, target.prefill(ids[:-1], target.new_cache()).hidden, torch.tensor(ids[1:]))
            ask = sequence.rows.ask(drafter.num_heads)
            found = drafter.draft_all([ask], 6)
            sequence.rows.note_fed()
            assert found == [drafter.draft(fresh, 6)]
            looked += 1
    assert looked > 4


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["amphista-full", "medusa-paths"])
def test_batches_are_each_sequence_alone_and_plain(name, tree):
    """Admissions, prompts in chunks and answers of many lengths; the heads of all that are asked are one call."""
    target, calls = native_target(), []
    drafter = frozen(name)
    run = drafter._native._heads.run
    drafter._native._heads.run = lambda fed, *given: calls.append(len(fed)) or run(fed, *given)
    engine = Engine(target, drafter, anew(TREES[tree]))
    assert together(engine) == plainly(target)
    assert max(calls) > 1 or tree == "auto-dear"  # there one at a time shows what asking costs
