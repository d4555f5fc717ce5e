from __future__ import annotations

import random

import pytest

from amphista.engine.prefixes import BLOCK, PrefixStore
from amphista.engine.request import Request, State
from amphista.engine.scheduler import GROWTH, LEAST_CHUNK, MOST_CHUNK, Limits, Scheduler
from amphista.errors import CapacityError, ConfigError, QueueFullError
from tests.scheduled import FakeEngine, FakeSequence

SPARE = 8


def scheduler_of(num_rows, *, readable=lambda seconds, running: 512.0, prefixes=None, **limits):
    limits = {"max_waiting": None, "max_wait_seconds": None, "spare_rows": SPARE, **limits}
    return Scheduler(Limits(kv_bytes=10 * num_rows, row_bytes=10, **limits), readable, prefixes)


def request_of(num_prompt, max_tokens, *, key="", at=0.0, namespace="", first=1):
    return Request(FakeSequence([first] * num_prompt, max_tokens), key, namespace, at)


def never_ending(num_prompt, max_tokens, *, key="", first=1):
    return Request(FakeSequence([first] * num_prompt, max_tokens, ignore_eos=True), key)


def submitted(scheduler, *requests):
    for request in requests:
        scheduler.submit(request)
    return requests


def iterate(scheduler, engine=None, now=0.0):
    """One iteration as the loop makes it."""
    engine, plan = engine or FakeEngine(), scheduler.plan(now)
    for request in plan.preempted:
        request.sequence.release()
    if plan.reader is not None:
        plan.reader.sequence.chunk_len = plan.chunk_len
        if plan.match is not None:
            plan.reader.sequence.adopt(plan.match)
    for batch in ([plan.reader] if plan.reader else [], plan.running):
        engine.step([request.sequence for request in batch])
        for request in batch:
            if scheduler.advance(request):
                scheduler.end(request, State.FINISHED)
                request.sequence.release()
    scheduler.check_integrity()
    return plan


def test_a_request_goes_through_its_states():
    scheduler = scheduler_of(2000)
    (request,) = submitted(scheduler, request_of(600, 3))
    assert request.state is State.WAITING and scheduler.has_work
    plan = iterate(scheduler)
    assert plan.reader is request and plan.chunk_len == 512 and request.state is State.PREFILL
    assert request.num_reserved == 600 + 3 + SPARE
    assert iterate(scheduler).running == [] and request.state is State.RUNNING
    while scheduler.has_work:
        assert iterate(scheduler).running == [request]
    assert request.state is State.FINISHED and request.num_reserved == 0
    assert scheduler.free_bytes == 20_000 - scheduler.prefixes.num_bytes


def test_one_prompt_is_read_at_a_time():
    scheduler = scheduler_of(10_000)
    first, second = submitted(scheduler, request_of(1000, 50), request_of(10, 50))
    assert [iterate(scheduler).reader for _ in range(3)] == [first, first, second]


def test_the_chunk_is_the_longest_within_the_stall_limit():
    scheduler = scheduler_of(
        10_000, readable=lambda seconds, running: max(seconds, running * 0.01) * 1000, max_stall_seconds=0.08
    )
    submitted(scheduler, request_of(10, 300), request_of(10, 300), request_of(5000, 3))
    assert iterate(scheduler).chunk_len == 512  # nobody decodes
    assert iterate(scheduler).chunk_len == 80
    assert iterate(scheduler).chunk_len == 80
    assert len(scheduler.running) == 2
    scheduler.limits.__dict__["max_stall_seconds"] = 0.002
    assert iterate(scheduler).chunk_len == 20  # as long as a step
    scheduler._num_readable = lambda seconds, running: 3.0  # not even the shortest: it goes on nevertheless
    assert iterate(scheduler).chunk_len == LEAST_CHUNK
    scheduler._num_readable = lambda seconds, running: float("inf")
    assert iterate(scheduler).chunk_len == MOST_CHUNK


def test_keys_take_turns_and_within_one_the_first_comes_first():
    scheduler = scheduler_of(100_000)
    requests = [request_of(5, 500, key=key) for key in "aaaabbc"]
    submitted(scheduler, *requests)
    order = [iterate(scheduler).reader for _ in requests]
    assert [request.key for request in order] == list("abcabaa")
    for key in "abc":
        assert [r for r in order if r.key == key] == [r for r in requests if r.key == key]


def test_who_does_not_fit_yet_is_waited_for():
    scheduler = scheduler_of(700)
    big, small = submitted(scheduler, never_ending(300, 100, key="a"), request_of(300, 100, key="b"))
    (late,) = submitted(scheduler, request_of(5, 5, key="c"))
    iterate(scheduler)
    for _ in range(20):
        assert iterate(scheduler).reader is None  # `late` would fit, but it is not its turn
    assert small.state is late.state is State.WAITING and big.state is State.RUNNING


def test_slots_are_a_limit():
    scheduler = scheduler_of(100_000, max_running=2)
    requests = submitted(scheduler, *(request_of(5, 40) for _ in range(5)))
    while scheduler.has_work:
        assert len(iterate(scheduler).running) <= 2
    assert all(request.state is State.FINISHED for request in requests)


def test_what_can_never_fit_is_refused_in_a_sentence():
    scheduler = scheduler_of(200)
    with pytest.raises(CapacityError, match=r"may have 193 tokens, but the memory .* holds 192: shorten the prompt"):
        scheduler.submit(request_of(100, 93))
    request = request_of(100, 92)
    scheduler.submit(request)
    while scheduler.has_work:
        iterate(scheduler)
    assert request.state is State.FINISHED


@pytest.mark.parametrize("limits", [{"kv_bytes": 480}, {"row_bytes": 0}, {"max_running": 0}])
def test_limits_that_hold_nothing_are_refused(limits):
    with pytest.raises(ConfigError, match=r"expected 1 at least|a request takes .* MiB at least"):
        Limits(**{"kv_bytes": 1000, "row_bytes": 10, **limits})


def test_a_full_queue_says_when_to_come_again():
    scheduler = scheduler_of(10_000, max_waiting=1, max_running=1)
    submitted(scheduler, request_of(5, 100), request_of(5, 1000))
    with pytest.raises(QueueFullError) as caught:
        scheduler.submit(request_of(5, 5))
    assert caught.value.retry_after == 1.0  # nothing was measured yet
    scheduler.measured(20, 2.0)
    refused = request_of(5, 5)
    with pytest.raises(QueueFullError, match=r"2 requests wait already: try again in 36 s") as caught:
        scheduler.submit(refused)
    assert caught.value.retry_after == pytest.approx((100 + GROWTH) / 10)
    assert refused.state is State.FAILED and len(scheduler.waiting) == 2


def test_who_gets_a_free_place_does_not_wait():
    scheduler = scheduler_of(10_000, max_waiting=0, max_running=2)
    submitted(scheduler, request_of(5, 100), request_of(5, 100))
    for _ in range(3):
        with pytest.raises(QueueFullError):
            scheduler.submit(request_of(5, 5))
        iterate(scheduler)
    assert len(scheduler.running) == 2


def test_what_was_measured_lately_counts_most():
    scheduler = scheduler_of(10_000)
    submitted(scheduler, request_of(5, 100))
    scheduler.measured(1000, 1.0)
    for _ in range(500):
        scheduler.measured(1, 1.0)
    assert scheduler.retry_after == pytest.approx(100, rel=0.01)


def test_waiting_ends_but_not_for_who_has_begun():
    scheduler = scheduler_of(400, max_wait_seconds=60.0)
    old, young = submitted(scheduler, request_of(100, 250), request_of(20, 250))
    iterate(scheduler)
    plan = iterate(scheduler, now=60.0)
    assert plan.expired == [] and old.state is State.RUNNING
    plan = iterate(scheduler, now=60.5)
    assert plan.expired == [young] and young.state is State.FAILED
    assert old.state is State.RUNNING and scheduler.waiting == []


def test_rows_grow_in_steps_and_end_with_the_limit():
    scheduler, engine = scheduler_of(2000), FakeEngine(lambda: 3)
    request = never_ending(20, 700)
    submitted(scheduler, request)
    reserved = set()
    while scheduler.has_work:
        iterate(scheduler, engine)
        reserved.add(request.num_reserved)
    first = 20 + GROWTH + SPARE
    assert reserved == {0, first, first + GROWTH + 3, 20 + 700 + SPARE}  # grown at the first 3 tokens beyond


def test_short_of_rows_kept_prefixes_go_oldest_first_before_anybody_is_preempted():
    store = PrefixStore(10_000)
    scheduler = scheduler_of(930, prefixes=store)
    kept = [never_ending(BLOCK, 60, first=first) for first in (2, 3)]
    for request in kept:
        submitted(scheduler, request)
        while scheduler.has_work:
            iterate(scheduler)
    assert store.num_bytes == 2 * 10 * (BLOCK + 59)
    first, second = submitted(scheduler, never_ending(20, 700, first=4), never_ending(20, 700, first=5))
    dropped = []
    while scheduler.has_work:
        plan = iterate(scheduler)
        alive = [store.find("", request.sequence.prompt) is not None for request in kept]
        if alive not in dropped:
            dropped.append(alive)
        assert not (plan.preempted and any(alive))
    assert dropped == [[True, True], [False, True], [False, False]]
    assert first.sequence.num_released == 1 and second.sequence.num_released >= 1


def test_the_youngest_makes_room_and_goes_on_with_its_tokens():
    scheduler = scheduler_of(700, max_wait_seconds=60.0)
    old, young = submitted(scheduler, never_ending(20, 600), never_ending(20, 300, first=2))
    preempted, states = [], []
    while scheduler.has_work:
        plan = iterate(scheduler)
        if plan.preempted:
            preempted += plan.preempted
            states.append(young.state)
            assert scheduler.plan(1e9).expired == []  # who has begun is not sent away
            num_tokens = len(young.sequence.token_ids)
            assert num_tokens > 21 and young.num_reserved == 0
            assert scheduler.waiting == [young]
    assert preempted == [young] and states == [State.PREEMPTED]
    assert old.state is young.state is State.FINISHED
    assert young.sequence.answer == young.sequence.alone


def test_the_youngest_is_the_last_to_arrive_even_where_it_was_admitted_first():
    scheduler = scheduler_of(1400, max_running=3)
    a1, a2, b1 = submitted(
        scheduler, never_ending(20, 900, key="a"), never_ending(20, 900, key="a"), never_ending(20, 900, key="b")
    )
    order = []
    while len(order) < 3:
        reader = iterate(scheduler).reader
        order += [reader] if reader else []
    assert order == [a1, b1, a2]
    while not (plan := iterate(scheduler)).preempted:
        pass
    assert plan.preempted == [b1]


def test_cancelled_wherever_it_is_everything_is_free_at_once():
    scheduler = scheduler_of(2000)
    running, reading, waiting = submitted(
        scheduler, never_ending(20, 500), never_ending(1200, 50, first=2), never_ending(20, 50, first=3)
    )
    iterate(scheduler)
    iterate(scheduler)
    assert [r.state for r in (running, reading, waiting)] == [State.RUNNING, State.PREFILL, State.WAITING]
    reserved_running = running.num_reserved
    for request in (reading, waiting):
        scheduler.end(request, State.CANCELLED)
        request.sequence.release()
        scheduler.check_integrity()
    assert scheduler.free_bytes == 20_000 - 10 * reserved_running
    assert iterate(scheduler).running == [running] and scheduler.reader is None
    scheduler.end(running, State.CANCELLED)
    running.sequence.release()
    assert scheduler.free_bytes == 20_000 and not scheduler.has_work
    assert scheduler.prefixes.find("", [1] * 100) is None  # neither kept nor shared
    scheduler.check_integrity()


def test_a_next_turn_takes_over_and_a_shared_prefix_is_copied():
    scheduler = scheduler_of(10_000)
    first = never_ending(100, 50)
    submitted(scheduler, first)
    while scheduler.has_work:
        iterate(scheduler)
    history = list(first.sequence.token_ids)
    other = Request(FakeSequence([1] * 100 + [9] * 10, 20, ignore_eos=True))
    following = Request(FakeSequence([*history, 5, 6, 7], 20, ignore_eos=True))
    submitted(scheduler, other, following)
    kept = scheduler.prefixes.num_bytes
    iterate(scheduler)
    assert other.sequence.num_adopted == [(99, True)] and scheduler.prefixes.num_bytes == kept
    iterate(scheduler)
    assert following.sequence.num_adopted == [(len(history) - 2, False)] and scheduler.prefixes.num_bytes == 0
    while scheduler.has_work:
        iterate(scheduler)  # checks every row


def test_equal_prompts_side_by_side_are_read_once():
    scheduler = scheduler_of(10_000)
    requests = submitted(scheduler, *(never_ending(300, 100) for _ in range(4)))
    while scheduler.has_work:
        iterate(scheduler)
    assert [r.sequence.num_adopted for r in requests] == [[], *[[(299, True)]] * 3]


def test_where_a_copy_has_no_room_the_kept_rows_are_moved():
    scheduler = scheduler_of(600)
    first = never_ending(200, 100)
    submitted(scheduler, first)
    while scheduler.has_work:
        iterate(scheduler)
    assert scheduler.prefixes.num_bytes > 0
    other = Request(FakeSequence([1] * 200 + [9] * 10, 200, ignore_eos=True))
    submitted(scheduler, other)
    iterate(scheduler)
    assert other.sequence.num_adopted == [(199, False)] and scheduler.prefixes.num_bytes == 0


def test_without_a_namespace_nothing_is_reused():
    scheduler = scheduler_of(10_000)
    for namespace in ("", None, None, "b"):
        request = request_of(100, 50, namespace=namespace)
        submitted(scheduler, request)
        while scheduler.has_work:
            iterate(scheduler)
        assert request.sequence.num_adopted == []


def test_caches_larger_than_reserved_never_overfill_what_is_kept():
    scheduler = scheduler_of(500)
    for first in range(1, 6):
        request = Request(FakeSequence([first] * 60, 40, slack=150, ignore_eos=True))
        submitted(scheduler, request)
        while scheduler.has_work:
            iterate(scheduler)
    assert 0 < scheduler.prefixes.num_bytes <= 5000


@pytest.mark.parametrize("seed", range(30))
def test_nobody_is_passed_over_twice(seed):
    """Between two turns of one key, every other key with somebody waiting has had one (law, without preemptions)."""
    rng = random.Random(seed)
    scheduler, engine = scheduler_of(100_000, max_running=3), FakeEngine(lambda: rng.randint(1, 5))
    arrived, admitted = [], []
    passed_over = {key: set() for key in "abcde"}
    for turn in range(400):
        if turn < 300 and rng.random() < 0.5:
            arrived += submitted(
                scheduler, request_of(rng.randint(1, 600), rng.randint(1, 40), key=rng.choice("aaabcde"))
            )
        waiting = {request.key for request in scheduler.waiting}
        plan = iterate(scheduler, engine)
        if plan.reader is not None and plan.reader not in admitted:
            admitted.append(plan.reader)
            assert waiting, "somebody was let in who did not wait"
            passed_over[plan.reader.key].clear()
            for key in waiting - {plan.reader.key}:
                assert plan.reader.key not in passed_over[key], f"{key} was passed over twice by {plan.reader.key}"
                passed_over[key].add(plan.reader.key)
    while scheduler.has_work:
        iterate(scheduler, engine)
    for key in "abcde":
        mine = [request for request in arrived if request.key == key]
        assert [r for r in admitted if r.key == key] == mine[: len([r for r in admitted if r.key == key])]


@pytest.mark.parametrize("seed", range(12))
def test_nobody_starves_however_short_rows_are(seed):
    """The oldest is never preempted and always goes on; all end within the steps that one by one would take."""
    rng = random.Random(seed)
    scheduler = scheduler_of(720, max_running=6)
    requests = [
        never_ending(rng.randint(1, 60), rng.randint(300, 600), key=rng.choice("abc"), first=n) for n in range(1, 10)
    ]
    submitted(scheduler, *requests)
    budget = sum(request.sequence.max_tokens + 2 for request in requests)
    num_preempted, num_iterations = 0, 0
    while scheduler.has_work:
        plan = iterate(scheduler)
        num_iterations += 1
        num_preempted += len(plan.preempted)
        if plan.preempted:
            assert min(r.number for r in scheduler.holding) < min(r.number for r in plan.preempted)
        assert plan.reader or plan.running, "work, and nothing done"
    assert all(request.state is State.FINISHED for request in requests)
    assert num_preempted > 0 and num_iterations <= budget
