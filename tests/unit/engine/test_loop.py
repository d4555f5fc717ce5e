from __future__ import annotations

import random
import subprocess
import sys
import threading
import time

import pytest

from amphista.engine.loop import EngineLoop, updates
from amphista.engine.request import State
from amphista.engine.scheduler import Limits, Scheduler
from amphista.errors import CapacityError, QueueFullError, UnavailableError
from tests.scheduled import FakeEngine, FakeSequence, answer_alone


def loop_of(engine=None, *, num_rows=3000, clock=time.monotonic, publish=None, **limits):
    limits = {"max_waiting": None, "max_wait_seconds": None, "spare_rows": 8, **limits}
    scheduler = Scheduler(Limits(kv_bytes=10 * num_rows, row_bytes=10, **limits), lambda seconds, running: 512)
    keywords = {} if publish is None else {"publish": publish}
    return EngineLoop(engine or FakeEngine(), scheduler, clock=clock, **keywords)


def long(num_tokens, first=1):
    """A sequence that goes on to its limit."""
    return FakeSequence([first, 5], num_tokens, ignore_eos=True)


def gathered(request):
    """All tokens that a reader gets, the state at the end, and the error."""
    received = list(updates(request))
    assert all(update.state is State.RUNNING for update in received[:-1])
    assert request.outbox.empty(), "something came behind the end"
    assert request.state is received[-1].state
    return [token for update in received for token in update.result or []], received[-1].state, received[-1].error


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name == "amphista-engine"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = engine_threads()  # a server that other tests share may run in this process
    yield
    assert [thread for thread in engine_threads() if thread not in before] == []


def test_nothing_of_it_needs_torch():
    code = "import sys, amphista.engine.loop; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_batch_runs_in_the_callers_thread():
    loop = loop_of()
    prompts = [[n] * (n + 1) for n in range(20)]
    requests = [loop.submit(FakeSequence(prompt, 30)) for prompt in prompts]
    loop.run_until_done()
    for prompt, request in zip(prompts, requests, strict=True):
        assert gathered(request) == (answer_alone(prompt, 30), State.FINISHED, None)
        assert request.sequence.rows.num_rows == 0  # its rows are the store's
    assert 10 < max(loop._engine.batches) <= 16
    loop.close()


def test_readers_hear_nothing_while_a_prompt_is_read():
    loop = loop_of()
    request = loop.submit(FakeSequence([1] * 1200, 3, ignore_eos=True))
    loop.run_until_done()
    assert len(loop._engine.batches) == 3 + 2 and request.outbox.qsize() == 3
    assert gathered(request)[:2] == (request.sequence.alone, State.FINISHED)


def test_a_refusal_is_its_own_and_drops_nobody():
    loop = loop_of(max_waiting=1, max_running=1)
    good, bad, other, late = (
        loop.submit(FakeSequence([n], tokens)) for n, tokens in ((1, 9), (2, 5000), (3, 9), (4, 9))
    )
    loop.run_until_done()
    assert gathered(good)[1] is gathered(other)[1] is State.FINISHED
    assert type(gathered(bad)[2]) is CapacityError and bad.state is State.FAILED
    assert type(gathered(late)[2]) is QueueFullError and late.state is State.FAILED


def test_what_cannot_be_a_key_is_refused_at_the_door():
    loop = loop_of()
    for keyword in ("key", "namespace"):
        with pytest.raises(TypeError, match="unhashable"):
            loop.submit(FakeSequence([1], 5), **{keyword: ["a", "list"]})
    assert not loop.step_once() and loop._inbox.empty()


def test_waited_too_long_is_told():
    now = [100.0]
    loop = loop_of(max_running=1, max_wait_seconds=60.0, clock=lambda: now[0])
    first, second = loop.submit(long(50)), loop.submit(FakeSequence([2], 5))
    loop.step_once()
    now[0] = 161.0
    loop.step_once()
    state, error = gathered(second)[1:]
    assert state is State.FAILED and isinstance(error, UnavailableError) and "waited 61 s" in str(error)
    loop.run_until_done()
    assert gathered(first)[1] is State.FINISHED


def test_a_row_that_fails_takes_nobody_along():
    engine = FakeEngine()
    loop = loop_of(engine)
    requests = [loop.submit(long(20, n)) for n in range(4)]
    for _ in range(8):
        loop.step_once()
    engine.row_errors[id(requests[2].sequence)] = ValueError("not finite")
    loop.step_once()
    assert requests[2].state is State.FAILED and requests[2].sequence.rows.num_rows == 0
    loop.scheduler.check_integrity()
    loop.run_until_done()
    for n, request in enumerate(requests):
        tokens, state, error = gathered(request)
        whole = request.sequence.alone
        assert (tokens == whole) == (n != 2) and tokens == whole[: len(tokens)]
        assert (state, str(error)) == ((State.FAILED, "not finite") if n == 2 else (State.FINISHED, "None"))


def test_a_step_that_raises_ends_its_requests_and_the_loop_goes_on():
    engine = FakeEngine()
    loop = loop_of(engine)
    requests = [loop.submit(long(20, n)) for n in range(3)]
    for _ in range(3):
        loop.step_once()
    reading, waiting = loop.submit(FakeSequence([7], 5)), loop.submit(FakeSequence([9], 5))
    loop._read_inbox()
    engine.step_error = MemoryError("no room")
    loop.step_once()
    assert engine.batches[-1] == 4, "a chunk and the decoding are one step"
    assert [r.state for r in [*requests, reading]] == [State.FAILED] * 4 and waiting.state is State.WAITING
    assert loop.scheduler.free_bytes == 30_000
    assert all(isinstance(gathered(request)[2], MemoryError) for request in [*requests, reading])
    later = loop.submit(FakeSequence([8], 5))
    loop.run_until_done()
    assert gathered(later)[:2] == (answer_alone([8], 5), State.FINISHED)


def test_rows_that_cannot_be_copied_fail_alone():
    loop = loop_of()
    first = loop.submit(FakeSequence([1] * 50, 40))
    broken = FakeSequence([1] * 50, 40)
    broken.adopt_error = MemoryError("no room")
    second, third = loop.submit(broken), loop.submit(FakeSequence([1] * 50, 40))
    loop.run_until_done()
    assert [gathered(r)[1] for r in (first, second, third)] == [State.FINISHED, State.FAILED, State.FINISHED]
    assert third.sequence.num_adopted == [(49, True)]


def test_cancel_frees_before_the_next_step_and_comes_too_late_for_the_ended():
    loop = loop_of()
    first, second = (loop.submit(long(50, n)) for n in (1, 2))
    for _ in range(5):
        loop.step_once()
    loop.cancel(first)
    loop.cancel(first)
    loop.step_once()
    assert first.state is State.CANCELLED and loop._engine.batches[-1] == 1
    loop.run_until_done()
    loop.cancel(second)
    loop.step_once()
    assert gathered(first)[1:] == (State.CANCELLED, None)
    assert gathered(second)[:2] == (second.sequence.alone, State.FINISHED)


def test_cancelled_before_it_was_looked_at():
    loop = loop_of()
    request = loop.submit(FakeSequence([1], 5))
    loop.cancel(request)
    assert not loop.step_once()
    assert gathered(request) == ([], State.CANCELLED, None) and loop._engine.batches == []


def test_all_updates_of_an_iteration_are_published_together():
    published = []
    loop = loop_of(publish=published.append)
    for n in range(3):
        loop.submit(long(10, n))
    loop.run_until_done()
    assert max(map(len, published)) == 3 and all(published)
    assert sum(update.state.has_ended for batch in published for update in batch) == 3


def test_who_hears_of_an_end_may_hand_in_the_next_turn():
    turns = {}

    def follow(batch):
        for update in batch:
            number = turns.pop(update.request, 0) if update.state.has_ended else 3
            if number < 3:
                history = [*update.request.sequence.token_ids, 8, 9]
                turns[loop.submit(FakeSequence(history, 40, ignore_eos=True))] = number + 1
            elif update.state.has_ended:
                ended.append(update.request)

    ended, loop = [], loop_of(publish=follow)
    turns |= {loop.submit(FakeSequence([n] * 40, 40, ignore_eos=True)): 1 for n in range(1, 5)}
    loop.run_until_done()
    assert turns == {} and len(ended) == 4
    for request in ended:
        assert len(request.sequence.prompt) == 40 + 2 * 42 and request.sequence.answer == request.sequence.alone
        assert request.sequence.num_adopted == [(40 + 42 + 40 - 2, False)]


def test_an_interrupt_loses_nothing():
    engine = FakeEngine()
    loop = loop_of(engine)
    requests = [loop.submit(long(20, n)) for n in range(3)]
    for _ in range(4):
        loop.step_once()
    engine.step_error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        loop.step_once()
    loop.scheduler.check_integrity()
    loop.run_until_done()
    for request in requests:
        assert gathered(request)[:2] == (request.sequence.alone, State.FINISHED)


@pytest.mark.parametrize("threaded", [False, True])
def test_closed_at_once_everybody_is_told(threaded):
    engine = Slow()
    loop = loop_of(engine, max_running=2)
    if threaded:
        loop.start()
    requests = [loop.submit(long(400, n)) for n in range(6)]
    if threaded:
        requests[0].outbox.get()
    loop.close(0)
    for request in requests:
        state, error = gathered(request)[1:]
        assert state is State.FAILED and isinstance(error, UnavailableError) and "closed" in str(error)
    with pytest.raises(UnavailableError, match="no request is taken"):
        loop.submit(FakeSequence([1], 5))
    assert loop.scheduler.free_bytes == 30_000
    loop.close()


@pytest.mark.parametrize("threaded", [False, True])
def test_closed_orderly_everybody_ends(threaded):
    loop = loop_of(Slow())
    if threaded:
        loop.start()
    requests = [loop.submit(long(30, n)) for n in range(6)]
    loop.close()
    for request in requests:
        assert gathered(request)[:2] == (request.sequence.alone, State.FINISHED)


def test_closed_with_a_limit_the_rest_is_broken_off():
    loop = loop_of(Slow())
    loop.start()
    short, longer = loop.submit(FakeSequence([1], 1)), loop.submit(long(2000))
    assert gathered(short)[1] is State.FINISHED
    loop.close(0.1)
    assert gathered(longer)[1] is State.FAILED and 0 < len(longer.sequence.answer) < 2000


def test_idle_it_sleeps_and_wakes():
    loop, plans = loop_of(), []
    plan = loop.scheduler.plan
    loop.scheduler.plan = lambda now: plans.append(now) or plan(now)
    loop.start()
    for n in range(3):
        request = loop.submit(FakeSequence([n], 9))
        assert gathered(request)[:2] == (answer_alone([n], 9), State.FINISHED)
        num_plans = len(plans)
        time.sleep(0.02)
        assert len(plans) == num_plans
    loop.close()


def test_what_came_before_it_was_closed_is_done():
    loop = loop_of()
    requests = [loop.submit(FakeSequence([n], 9)) for n in range(3)]
    with loop._door:
        loop._is_closed = True
    loop.start()  # finds it closed, and three requests that nobody has looked at
    loop._thread.join()
    assert [request.state for request in requests] == [State.FINISHED] * 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_of_ours_leaves_nobody_waiting():
    loop = loop_of()
    requests = [loop.submit(long(20, n)) for n in range(3)]
    loop.scheduler.measured = lambda num_tokens, seconds: 1 / 0
    loop.start()
    for request in requests:
        assert isinstance(gathered(request)[2], ZeroDivisionError)
    loop._thread.join()
    with pytest.raises(UnavailableError):
        loop.submit(FakeSequence([1], 5))
    loop.close()


class Slow(FakeEngine):
    """A millisecond a step, as far as sleeping goes."""

    def step(self, batch):
        time.sleep(0.001)
        return super().step(batch)


def storm(loop, seed, answers, num_requests=25):
    """One client: submits, cancels some, reads some at once and the others at the end (or never gets in)."""
    rng = random.Random(seed)
    unread = []
    for number in range(num_requests):
        prompt = [seed] * rng.randint(1, 90) + [number] * rng.randint(1, 40)
        try:
            request = loop.submit(FakeSequence(prompt, rng.randint(1, 60)), key=seed % 3, namespace=seed % 2)
        except UnavailableError:
            answers.append(None)
            continue
        if rng.random() < 0.3:
            time.sleep(rng.random() * 0.003)
            loop.cancel(request)
        if rng.random() < 0.2:
            answers.append((request, *gathered(request)))
        else:
            unread.append(request)
    answers += [(request, *gathered(request)) for request in unread]


@pytest.mark.parametrize("closing", ["after", "while busy", "at once"])
def test_a_storm_from_many_threads_loses_and_doubles_nothing(closing):
    loop = loop_of(Slow(), num_rows=700, max_running=6)
    loop.start()
    answers = [[] for _ in range(8)]
    clients = [threading.Thread(target=storm, args=(loop, seed, answers[seed])) for seed in range(8)]
    for client in clients:
        client.start()
    if closing != "after":
        while len(loop._engine.batches) < 60:
            time.sleep(0.001)
        loop.close(None if closing == "while busy" else 0)
    for client in clients:
        client.join(60)
        assert not client.is_alive(), "a reader waits for ever"
    loop.close()
    answers = [answer for mine in answers for answer in mine]
    assert len(answers) == 8 * 25
    refused, answers = answers.count(None), [answer for answer in answers if answer is not None]
    for request, tokens, state, error in answers:
        whole = request.sequence.alone
        assert tokens == request.sequence.answer == (whole if state is State.FINISHED else whole[: len(tokens)])
        assert (error is not None) == (state is State.FAILED)
    states = {state for _, _, state, _ in answers}
    assert State.CANCELLED in states and (State.FAILED in states) == (closing == "at once")
    assert (refused == 0) == (closing == "after")
    assert loop.scheduler.free_bytes == 7000 - loop.scheduler.prefixes.num_bytes and not loop.scheduler.has_work
    loop.scheduler.check_integrity()


def test_a_reader_that_never_reads_slows_nobody():
    loop = loop_of()
    loop.start()
    unread = [loop.submit(long(100, n)) for n in range(5)]
    read = loop.submit(FakeSequence([1], 9))
    assert gathered(read)[1] is State.FINISHED
    loop.close()
    for request in unread:  # all is there, in order, for whoever comes late
        assert gathered(request)[:2] == (request.sequence.alone, State.FINISHED)
