"""Law: whatever arrives, is cancelled, fails or is preempted, and in whatever order: rows are accounted exactly at any
time, every request ends once and with the tokens it gets alone, and at the end all is free.

Scheduler, prefix store and loop run as they are; the model is made of integers (`tests/scheduled.py`), so that a row
of another request, of another position or with another next token shows at once.
"""

from __future__ import annotations

import functools
import random
from collections import Counter

import pytest

from amphista.engine.loop import EngineLoop
from amphista.engine.request import Request, State
from amphista.engine.scheduler import Limits, Scheduler
from amphista.errors import CapacityError, QueueFullError, UnavailableError
from tests.scheduled import FakeEngine, FakeSequence

NUM_ROWS, SPARE = 900, 8
SEEDS = range(14)
SYSTEM = [7] * 70


class InjectedError(Exception):
    """A failure that the test made."""


class CountingEngine(FakeEngine):
    """Checks before each step that a whole tree fits into what is reserved."""

    requests: dict[FakeSequence, Request]

    def step(self, batch):
        for sequence in batch:
            num_written = min(sequence.num_unread, sequence.chunk_len) or SPARE
            assert sequence.rows.num_rows + num_written <= self.requests[sequence].num_reserved
        return super().step(batch)


class Storm:
    """Random traffic against a loop that runs inline; counts what happened, so that no law holds of nothing."""

    def __init__(self, seed: int) -> None:
        self.rng, self.now, self.seen = random.Random(seed), 0.0, Counter()
        limits = Limits(
            kv_bytes=10 * NUM_ROWS,
            row_bytes=10,
            max_running=self.rng.randint(2, 8),
            spare_rows=SPARE,
            max_waiting=12,
            max_wait_seconds=60.0,
        )
        self.engine = CountingEngine(lambda: self.rng.randint(1, 8))
        scheduler = Scheduler(limits, lambda seconds, running: max(seconds, running * 1e-2) * 1e3)
        self.loop = EngineLoop(self.engine, scheduler, publish=self.receive, clock=lambda: self.now)
        self.scheduler = scheduler
        self.requests, self.tokens, self.ends = [], {}, {}
        self.engine.requests = {}
        self.histories: list[list[int]] = []

    def receive(self, batch) -> None:
        for update in batch:
            request = update.request
            assert request not in self.ends, "an update behind the end"
            self.tokens.setdefault(request, []).extend(update.result or [])
            if update.state.has_ended:
                self.ends[request] = update
                self.seen[update.state] += 1
                self.seen[type(update.error)] += 1
                if update.state is State.FINISHED:
                    self.histories.append(list(request.sequence.token_ids))

    def submit(self) -> None:
        rng = self.rng
        prompt = [rng.randint(1, 3)] * rng.randint(1, 150)
        kind = rng.random()
        if kind < 0.3:
            prompt = SYSTEM + prompt
        elif kind < 0.6 and self.histories:
            prompt = rng.choice(self.histories[-5:])[: NUM_ROWS // 2] + prompt[:20]
        max_tokens = rng.choice([1, 5, 40, 300, 500, 2000 if rng.random() < 0.1 else 60])
        sequence = FakeSequence(prompt, max_tokens, ignore_eos=rng.random() < 0.4, slack=rng.choice([0, 0, 30]))
        if rng.random() < 0.02:
            sequence.adopt_error = InjectedError("adopt")
        namespace = rng.choice(["a", "a", "b", None])
        request = self.loop.submit(sequence, key=rng.randint(0, 2), namespace=namespace)
        self.requests.append(request)
        self.engine.requests[sequence] = request

    def disturb(self) -> None:
        """One thing that may happen between two iterations."""
        rng, draw = self.rng, self.rng.random()
        live = [request for request in self.requests if not request.state.has_ended]
        target = rng.choice(live if live and rng.random() < 0.9 else self.requests[-12:] or [None])
        if draw < 0.2:
            for _ in range(rng.randint(1, 3) if rng.random() < 0.9 else 15):
                self.submit()
        elif draw < 0.27 and target is not None:
            self.seen["cancel", target.state] += 1
            self.loop.cancel(target)
        elif draw < 0.29 and target is not None:
            self.engine.row_errors[id(target.sequence)] = InjectedError("row")
        elif draw < 0.30:
            self.engine.step_error = InjectedError("step")
        elif draw < 0.31:
            self.now += 61.0

    def step(self) -> bool:
        self.now += 0.05
        goes_on = self.loop.step_once()
        self.check()
        return goes_on

    def check(self) -> None:
        """What must hold after every iteration, counted here from the sequences themselves."""
        scheduler = self.scheduler
        scheduler.check_integrity()
        holding = set(scheduler.holding)
        owned = [id(request.sequence.rows) for request in holding]
        kept = [id(entry.rows) for entry in scheduler.prefixes._entries.values() if entry.is_kept]
        assert len({*owned, *kept}) == len(owned) + len(kept), "rows with two owners"
        num_rows = sum(request.sequence.rows.num_rows for request in holding)
        assert 10 * num_rows + scheduler.prefixes.num_bytes <= 10 * NUM_ROWS
        for request in self.requests:
            if request not in holding:
                assert request.sequence.rows.num_rows == 0 == request.num_reserved
            self.seen["preempted"] += request.state is State.PREEMPTED
            assert (request in self.ends) == request.state.has_ended or request.state is State.WAITING

    def check_end(self) -> None:
        """Everybody ended once, with his own tokens, and all is free."""
        assert set(self.ends) == set(self.requests)
        for request, end in self.ends.items():
            tokens, alone = self.tokens[request], request.sequence.alone
            assert tokens == request.sequence.answer == alone[: len(tokens)]
            assert end.state is not State.FINISHED or tokens == alone
            assert (end.error is not None) == (end.state is State.FAILED)
            assert not (isinstance(end.error, UnavailableError) and tokens), "sent away in mid-answer"
            expected = (InjectedError, CapacityError, QueueFullError, UnavailableError, type(None))
            assert isinstance(end.error, expected), end.error
            self.seen.update("copied" if is_copy else "moved" for _, is_copy in request.sequence.num_adopted)
        scheduler = self.scheduler
        assert not scheduler.has_work and scheduler._queues == {}
        while scheduler.prefixes.num_bytes:
            scheduler.prefixes.drop_oldest()
        assert scheduler.free_bytes == 10 * NUM_ROWS
        assert scheduler.prefixes._entries == {} == scheduler.prefixes._by_block


@functools.cache
def run_storm(seed: int, num_iterations: int = 400) -> Storm:
    storm = Storm(seed)
    for _ in range(num_iterations):
        storm.disturb()
        storm.step()
    for _ in range(20_000):  # nobody waits for ever
        if not storm.step():
            break
    storm.check_end()
    return storm


@pytest.mark.parametrize("seed", SEEDS)
def test_after_any_storm_everybody_has_ended_once_and_all_is_free(seed):
    run_storm(seed)


def test_the_storms_were_storms():
    """What the law was held against; a traffic without preemptions would prove little."""
    seen = sum((run_storm(seed).seen for seed in SEEDS), Counter())
    for kind in (State.FINISHED, State.CANCELLED, InjectedError, CapacityError, QueueFullError, UnavailableError):
        assert seen[kind] > 5, kind
    for state in (State.WAITING, State.PREFILL, State.RUNNING, State.PREEMPTED, State.FINISHED):
        assert seen["cancel", state] > 0, state
    assert seen["preempted"] > 20 and seen["moved"] > 20 and seen["copied"] > 20
