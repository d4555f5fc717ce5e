"""EngineLoop: the one thread that owns the engine; requests come in by a queue, what happens to each goes out by one.

    loop = EngineLoop(engine, Scheduler(limits, num_readable))
    loop.start()
    request = loop.submit(sequence)         # any thread
    for update in updates(request): ...     # its results, then one update with the state it ended in
    loop.close()

An iteration: inbox, expiry, admission, one step of all that decode and at most one chunk of a prompt, publish. Without
`start` the same class runs in the caller's thread: `run_until_done`.

Laws: every request gets each of its results once and ends once, whatever others do and whenever the loop is closed;
nobody waits for a reader; what a step raises ends the requests it was for, and no others.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

from amphista.engine.request import Request, Schedulable, State
from amphista.engine.scheduler import Schedule, Scheduler
from amphista.errors import AmphistaError, UnavailableError

CLOSED = "the engine was closed before the answer ended"


class Stepper(Protocol):
    """The engine, as far as the loop knows it."""

    def step(self, batch: Any) -> Sequence[Any]:
        """One forward for all sequences; a result for each, an exception in place of it where only that one failed."""


@dataclass(frozen=True)
class Update:
    """What an iteration meant for a request: what the step returned for it, and the error where it failed."""

    request: Request
    state: State
    result: Any = None
    error: BaseException | None = None


def to_outboxes(batch: list[Update]) -> None:
    """Put each update where its request's reader waits for it."""
    for update in batch:
        update.request.outbox.put(update)


def updates(request: Request) -> Iterator[Update]:
    """Wait for a request's updates; the last one has the state it ended in."""
    while True:
        update: Update = request.outbox.get()
        yield update
        if update.state.has_ended:
            return


class EngineLoop:
    """Runs requests through an engine. `submit` and `cancel` may be called from anywhere, `close` from other threads.

    publish: gets all updates of an iteration at once, in the engine's thread: it must neither wait nor raise.
    """

    def __init__(
        self,
        engine: Stepper,
        scheduler: Scheduler,
        *,
        publish: Callable[[list[Update]], None] = to_outboxes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self._engine, self._publish, self._clock = engine, publish, clock
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._updates: list[Update] = []
        self._door = threading.Lock()  # held to put a request in, or to shut: none gets in behind the last look
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Run in a thread of its own from now on."""
        assert self._thread is None, "the loop runs already"
        self._thread = threading.Thread(target=self._run, name="amphista-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether its own thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, sequence: Schedulable, *, key: Hashable = "", namespace: Hashable = "") -> Request:
        """Hand in a sequence; a refusal comes as an update, too. raises UnavailableError once the loop is closed.

        key: requests of different keys (tenants) take turns. namespace: within which rows are reused; None: not at all.
        """
        request = Request(sequence, key, namespace, self._clock())
        hash((key, namespace))  # what cannot be a key is the caller's error, here
        with self._door:
            if self._is_closed:
                raise UnavailableError("the engine was closed: no request is taken any more")
            self._inbox.put(lambda: self._accept(request))
        return request

    def cancel(self, request: Request) -> None:
        """End a request before its next step; one that has ended stays as it is."""
        self._inbox.put(lambda: self._end(request, State.CANCELLED))

    def close(self, drain_seconds: float | None = None) -> None:
        """Take no more requests; return once all have ended and the thread is gone.

        drain_seconds: how long answers may still go on, None: to their end; the rest fail with UnavailableError.
        """
        with self._door:
            self._is_closed = True
        if self._thread is not None:
            self._inbox.put(lambda: None)  # wakes it
            self._thread.join(drain_seconds)
            self._inbox.put(lambda: self._fail_all(UnavailableError(CLOSED)))
            self._thread.join()
        else:
            deadline = float("inf") if drain_seconds is None else self._clock() + drain_seconds
            while self._clock() < deadline and self.step_once():
                pass
            self._fail_all(UnavailableError(CLOSED))

    def run_until_done(self) -> None:
        """Run in this thread until every request has ended."""
        while self.step_once():
            pass

    def step_once(self) -> bool:
        """One iteration in this thread; returns whether any request has not ended yet."""
        self._read_inbox()
        started = self._clock()
        plan = self.scheduler.plan(started)
        for request in plan.expired:
            waited = f"waited {started - request.submitted_at:.0f} s for its turn: try again later"
            self._updates.append(Update(request, request.state, error=UnavailableError(waited)))
        for request in plan.preempted:
            request.sequence.release()
        batch = [plan.reader] if plan.reader is not None and self._can_read(plan.reader, plan) else []
        if not (batch and math.isinf(self.scheduler.limits.max_stall_seconds)):
            batch += plan.running  # else they wait until all prompts are read: steps are full then
        num_tokens = self._step(batch)
        self.scheduler.measured(num_tokens, self._clock() - started)
        self._flush()
        return self.scheduler.has_work or not self._inbox.empty()

    def _run(self) -> None:
        """The thread."""
        try:
            while self.scheduler.has_work or not (self._is_closed and self._inbox.empty()):
                if not self.scheduler.has_work:
                    self._inbox.get()()  # waits
                self.step_once()
        except BaseException as error:  # a defect of ours: nobody may wait for ever
            with self._door:
                self._is_closed = True
            self._fail_all(error)
            raise

    def _read_inbox(self) -> None:
        while not self._inbox.empty():  # only one thread takes out
            self._inbox.get()()

    def _can_read(self, reader: Request, plan: Schedule) -> bool:
        """Give who reads next what is known of its prompt already; False where that fails."""
        reader.sequence.chunk_len = plan.chunk_len
        try:
            if plan.match is not None:
                reader.sequence.adopt(plan.match)
        except Exception as error:
            self._end(reader, State.FAILED, error=error)
            return False
        return True

    def _step(self, requests: list[Request]) -> int:
        """One forward for some; what fails ends alone. Returns the tokens added to their answers."""
        if not requests:
            return 0
        sequences = [request.sequence for request in requests]
        num_before = sum(len(sequence.token_ids) for sequence in sequences)
        try:
            results = self._engine.step(sequences)
        except Exception as error:
            results = [error] * len(requests)
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, Exception):
                self._end(request, State.FAILED, error=result)
            elif self.scheduler.advance(request):
                self._end(request, State.FINISHED, result)
            elif request.state is State.RUNNING:
                self._updates.append(Update(request, request.state, result))
        return sum(len(sequence.token_ids) for sequence in sequences) - num_before

    def _accept(self, request: Request) -> None:
        try:
            self.scheduler.submit(request)
        except AmphistaError as error:
            self._updates.append(Update(request, request.state, error=error))

    def _end(self, request: Request, state: State, result: Any = None, error: BaseException | None = None) -> None:
        """End a request, once."""
        if request.state.has_ended:
            return
        self.scheduler.end(request, state)
        request.sequence.release()
        self._updates.append(Update(request, state, result, error))

    def _fail_all(self, error: BaseException) -> None:
        """End all that is there, unread requests included, and say so."""
        self._read_inbox()
        for request in [*self.scheduler.holding, *self.scheduler.waiting]:
            self._end(request, State.FAILED, error=error)
        self._flush()

    def _flush(self) -> None:
        batch, self._updates = self._updates, []
        if batch:
            self._publish(batch)
