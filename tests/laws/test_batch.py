"""Law 5: a batch's tokens are those of each prompt decoded alone, greedy and keyed, whatever the number of slots and
the order of admission, on every tested family; slots are refilled and moved on the way, and windows are crossed.

Mutations (a position off by one, a dropped or an extra mask bit, a window off by one, a slot not moved, noise of
another position) must be seen by the same check.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from amphista.cache.slots import SlotCache
from amphista.drafter.none import NoDrafter
from amphista.engine import batch
from amphista.engine.batch import BatchDecoder, Request
from amphista.engine.decoder import decode
from amphista.engine.loops import loop_free_length
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.step import Engine
from amphista.errors import ConfigError, RequestError
from amphista.target.attention import Layout
from amphista.tree.grow import parse_tree
from tests.oracle.decode import decode_plainly
from tests.tiny import EOS, FAMILIES, WINDOW, tiny_target

LENGTHS = [1, 3, WINDOW, WINDOW + 1, 2 * WINDOW + 1, 30, 2, 12, 5, WINDOW - 1, 7]
SETTINGS = [
    {},
    {"temperature": 0.7, "seed": 5},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "seed": 2**63},
    {"repetition_penalty": 1.4},
    {"temperature": 0.9, "repetition_penalty": 1.2, "seed": 8},
]
LIMITS = [24, 9, 1, 17, 30, 5, 22, 13]
REQUESTS = [
    Request(
        [(7 * i + 31 * length + 3) % 250 for i in range(length)],
        SamplingParams(max_new_tokens=LIMITS[n % len(LIMITS)], **SETTINGS[n % len(SETTINGS)]),
        n,
    )
    for n, length in enumerate(LENGTHS)
]


def alone(target, request):
    sequence = decode(Engine(target, NoDrafter(), parse_tree(1)), request.prompt_ids, request.params)
    return sequence.output_ids, sequence.finish_reason


def together(target, requests, num_slots, **options):
    decoder = BatchDecoder(target, num_slots, **options)
    results = {done.request.tag: (done.token_ids, done.reason) for done in decoder.run(requests)}
    decoder.check_integrity()
    assert len(results) == len(requests)
    return results, decoder


def differing(target, num_slots=4):
    """Requests whose batched output is not that of decoding alone."""
    results, _ = together(target, REQUESTS, num_slots)
    return [n for n, request in enumerate(REQUESTS) if results[n] != alone(target, request)]


@pytest.fixture(scope="module", params=FAMILIES)
def family_target(request):
    return tiny_target(request.param, dtype=torch.float64)


def test_batch_equals_alone(family_target):
    expected = {n: alone(family_target, request) for n, request in enumerate(REQUESTS)}
    num_tokens = sum(len(ids) for ids, _ in expected.values())
    for num_slots in (1, 4, len(REQUESTS) + 2):
        results, decoder = together(family_target, REQUESTS, num_slots)
        assert results == expected, f"{num_slots} slots"
        assert decoder.num_tokens == num_tokens
        if num_slots > 1:
            assert decoder.num_forwards < 0.6 * num_tokens, "forwards were not shared: the law would be vacuous"


@pytest.fixture(scope="module")
def target64():
    return tiny_target(dtype=torch.float64)


def test_any_order_of_admission(target64, monkeypatch):
    moved = []
    move = SlotCache.move
    monkeypatch.setattr(SlotCache, "move", lambda cache, *where: (moved.append(where), move(cache, *where))[1])
    requests = [dataclasses.replace(request, tag=i) for i, request in enumerate(REQUESTS * 2)]
    expected = {request.tag: alone(target64, request) for request in requests}
    for num_slots in (2, 3, 5, 30):
        for seed in range(4):
            shuffled = random.Random(seed).sample(requests, len(requests))
            assert together(target64, shuffled, num_slots)[0] == expected, f"{num_slots} slots, order {seed}"
    assert len(moved) > 20, "slots were hardly ever moved"


def test_equals_decoding_without_any_cache(target64):
    results, _ = together(target64, REQUESTS, 5)
    for n, request in enumerate(REQUESTS):
        assert results[n][0] == decode_plainly(target64.model, request.prompt_ids, request.params, {EOS})


def test_rows_end_in_different_ways(target64):
    reasons = {reason for _, reason in together(target64, REQUESTS, 3)[0].values()}
    assert reasons == {FinishReason.LENGTH} or FinishReason.STOP in reasons
    end = together(target64, REQUESTS, 3)[0][0][0][4]  # the fifth token of the first answer, now an end token
    stopping = tiny_target(dtype=torch.float64)
    stopping.eos_ids = frozenset([end])
    results, _ = together(stopping, REQUESTS, 3)
    assert results == {n: alone(stopping, request) for n, request in enumerate(REQUESTS)}
    assert {reason for _, reason in results.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert results[0][0][-1] == end and results[0][1] is FinishReason.STOP


def test_the_end_of_the_context(monkeypatch):
    small = tiny_target(dtype=torch.float64, max_position_embeddings=20)
    small.eos_ids = frozenset()
    requests = [
        Request([3 + n] * length, SamplingParams(max_new_tokens=50), n) for n, length in enumerate([1, 19, 20, 7])
    ]
    results, _ = together(small, requests, 2)
    assert results == {n: alone(small, request) for n, request in enumerate(requests)}
    assert [len(results[n][0]) for n in range(4)] == [20, 2, 1, 14]


def test_stop_strings_end_a_row():
    target = tiny_target(with_text=True, dtype=torch.float64)
    free, _ = alone(target, REQUESTS[0])
    stop = target.text.decode(free[:3])
    request = Request(REQUESTS[0].prompt_ids, SamplingParams(max_new_tokens=24, stop=(stop,)), 0)
    results, _ = together(target, [request, dataclasses.replace(REQUESTS[1], tag=1)], 2)
    assert results[0] == alone(target, request) and len(results[0][0]) < len(free)


# -- loops ------------------------------------------------------------------------------------------------------------


def test_loops_are_cut_where_they_show(target64):
    """A penalty below 1 favours what was already said, so that a random model loops, too."""
    penalties = [0.1, 0.1, 0.5, 1.0]
    requests = [
        Request([n, n + 50], SamplingParams(max_new_tokens=120, repetition_penalty=penalties[n % 4]), n)
        for n in range(12)
    ]
    results, _ = together(target64, requests, 4, cut_loops=True)
    looped = 0
    for request in requests:
        ids, reason = alone(target64, request)
        shown = next((n for n in range(1, len(ids) + 1) if loop_free_length(ids[:n]) < n), None)
        if shown is None or (reason is FinishReason.STOP and shown == len(ids)):
            assert results[request.tag] == (ids, reason)
        else:
            assert results[request.tag] == (ids[: loop_free_length(ids[:shown])], FinishReason.LOOP)
            looped += 1
    assert 3 <= looped < len(requests), "the law would be vacuous"


# -- turns of one conversation ---------------------------------------------------------------------------------------


def test_what_follows_keeps_its_slot_and_its_rows(target64, monkeypatch):
    """Three turns each, in a batch of three: as if every turn had been decoded alone; only what is new is read."""
    read = []
    prefill = type(target64).prefill
    monkeypatch.setattr(
        type(target64), "prefill", lambda t, ids, cache: (read.append(len(ids)), prefill(t, ids, cache))[1]
    )
    turns = {}

    def follow(done):
        name, turn = done.request.tag
        turns[name, turn] = done
        if turn == 2:
            return None
        asked = [*done.request.prompt_ids, *done.token_ids, 20 + name, 21, 22]
        return Request(asked, SamplingParams(max_new_tokens=6 + name, temperature=turn * 0.7), (name, turn + 1))

    decoder = BatchDecoder(target64, 3)
    first = [Request([5 + n] * (4 + 3 * n), SamplingParams(max_new_tokens=5 + n), (n, 0)) for n in range(7)]
    assert len(list(decoder.run(first, follow))) == len(turns) == 21
    monkeypatch.undo()
    for done in turns.values():
        assert (done.token_ids, done.reason) == alone(target64, done.request)
    later = sum(len(done.request.prompt_ids) for (_, turn), done in turns.items() if turn)
    assert sum(read) < later, "turns were read from their beginning"


def test_a_run_can_be_broken_off_and_another_one_started(target64):
    decoder = BatchDecoder(target64, 3)
    running = decoder.run(REQUESTS)
    next(running)
    running.close()
    results = {done.request.tag: (done.token_ids, done.reason) for done in decoder.run(REQUESTS[::-1])}
    assert results == {n: alone(target64, request) for n, request in enumerate(REQUESTS)}


def test_unusable_requests_are_refused(target64):
    with pytest.raises(ConfigError, match="a batch of 0"):
        BatchDecoder(target64, 0)
    with pytest.raises(RequestError, match="empty"):
        list(BatchDecoder(target64, 2).run([Request([], SamplingParams(), 0)]))


# -- mutations --------------------------------------------------------------------------------------------------------


def test_the_check_sees_nothing_where_nothing_is_wrong():
    assert differing(tiny_target("mistral-windowed", dtype=torch.float64)) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_mutation_position_off_by_one_is_seen(family):
    target = tiny_target(family, dtype=torch.float64)
    forward = target.model.forward

    def shifted(**inputs):
        moved = {"position_ids": inputs["position_ids"] + 1} if len(inputs["input_ids"]) > 1 else {}
        return forward(**{**inputs, **moved})

    target.model.forward = shifted
    assert len(differing(target)) >= 3


@pytest.mark.parametrize("kind", ["dropped", "extra"])
def test_mutation_one_mask_bit_is_seen(kind, monkeypatch):
    """A row that does not see its first token; a row that sees what another sequence left behind its own."""
    right = Layout.mask

    def wrong(layout, rule):
        if len(layout.visible) == 1:
            return right(layout, rule)
        visible = layout.visible.clone()
        if kind == "dropped":
            visible[1, 0, 0] = False
        else:
            shortest = int(visible[:, 0].sum(1).argmin())
            visible[shortest, 0, : int(visible[shortest, 0].sum()) + 1] = True
        return right(dataclasses.replace(layout, visible=visible), rule)

    monkeypatch.setattr(Layout, "mask", wrong)
    target = tiny_target(dtype=torch.float64)
    assert differing(target)


def test_mutation_window_off_by_one_is_seen(monkeypatch):
    target = tiny_target("mistral-windowed", dtype=torch.float64)
    expected = [alone(target, request) for request in REQUESTS]
    right = Layout.mask
    monkeypatch.setattr(
        Layout,
        "mask",
        lambda layout, rule: right(dataclasses.replace(layout, key_positions=layout.key_positions + 1), rule),
    )
    results, _ = together(target, REQUESTS, 4)
    assert sum(results[n] != one for n, one in enumerate(expected)) >= 3


def test_mutation_a_slot_that_is_not_moved_is_seen(monkeypatch):
    monkeypatch.setattr(SlotCache, "move", lambda cache, source, to: None)
    assert differing(tiny_target(dtype=torch.float64))


def test_mutation_noise_of_another_position_is_seen(monkeypatch):
    right = batch.choose_each
    monkeypatch.setattr(
        batch, "choose_each", lambda choosers, logits, positions: right(choosers, logits, [p + 1 for p in positions])
    )
    assert differing(tiny_target(dtype=torch.float64))
