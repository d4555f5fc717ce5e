"""Worker: between asyncio, which owns the sockets, and the engine's thread, which owns everything else.

Requests go in by the loop's inbox; what iterations did for all of them comes out by one call into asyncio. Behind a
forward nothing of asyncio's is in the processor's caches any more: 2 us of Python take 60 then. So where steps are
short several are told at once, but an answer's first and last tokens, and what stands before a prompt's chunk, at once.
A reader takes all that has come for it: a slow one gets longer pieces and holds nobody up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from amphista.engine.loop import EngineLoop, Update
from amphista.engine.pace import PacedEngine
from amphista.engine.request import Request
from amphista.engine.scheduler import Limits, Scheduler
from amphista.engine.sequence import Sequence as Decoded
from amphista.engine.step import Engine
from amphista.native.build import leave_team

STUCK_SECONDS = 60.0
TELL_SECONDS = 0.04  # tokens may wait so long for those of the next steps: 25 times a second is a film's pace


@dataclass(frozen=True)
class Load:
    """What the scheduler held behind an iteration. kv_usage: share of the memory for keys and values."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_preempted: int = 0


class Ticket:
    """The requests of one call, and what has come for them. is_patient: its reader is woken by ends alone."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.is_patient = False
        self._updates: list[Update] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, update: Update) -> None:
        """In asyncio's thread."""
        self._updates.append(update)
        if update.state.has_ended or not self.is_patient:
            self._wake()

    async def next(self, timeout: float) -> list[Update]:
        """All that has come; nothing if that takes longer than `timeout` seconds. One reader at a time."""
        if not self._updates:
            loop = asyncio.get_running_loop()
            self._waiting, timer = loop.create_future(), loop.call_later(timeout, self._wake)
            try:
                await self._waiting
            finally:
                timer.cancel()
        taken, self._updates = self._updates, []
        return taken

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class Worker:
    """Runs an engine in a thread of its own. `on_updates`: called in asyncio's thread with all updates of an
    iteration and the time it ended."""

    on_updates: Callable[[list[Update], float], None] | None = None

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.limits = limits
        self._paced = PacedEngine(engine)
        self._scheduler = Scheduler(limits, self._paced.num_readable)
        self._loop = EngineLoop(self._paced, self._scheduler, publish=self._publish)
        self._tickets: dict[Request, Ticket] = {}
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._held: list[tuple[list[Update], float]] = []  # of iterations not told yet, and when they ended
        self._told_at = self._ended_at = 0.0
        self.load = Load()

    def start(self) -> None:
        """From within the event loop that reads."""
        self._asyncio = asyncio.get_running_loop()
        leave_team()  # this thread has loaded, the engine's decodes
        self._loop.start()

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's thread lives, and steps where there is something to do."""
        is_stuck = self._tickets and time.monotonic() - self._paced.stepped_at > STUCK_SECONDS
        return self._loop.is_alive and not is_stuck

    def submit(self, sequences: Sequence[Decoded], key: Hashable, namespace: Hashable) -> Ticket:
        """Hand in sequences; refusals come as updates. raises UnavailableError once it is closed."""
        ticket = Ticket()
        if not self._tickets:
            self._paced.stepped_at = time.monotonic()  # it had nothing to do until now
        for sequence in sequences:
            request = self._loop.submit(sequence, key=key, namespace=namespace)
            ticket.requests.append(request)
            self._tickets[request] = ticket
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End what has not ended."""
        for request in ticket.requests:
            if self._tickets.pop(request, None) is not None:
                self._loop.cancel(request)

    async def close(self, drain_seconds: float) -> None:
        """Take no more; return once all have ended, those that take longer with an error."""
        await asyncio.to_thread(self._loop.close, drain_seconds)

    def _publish(self, updates: list[Update]) -> None:
        """In the engine's thread; somebody decodes on, so that another iteration follows, where nothing is told."""
        now = time.monotonic()
        next_at, self._ended_at = 2 * now - self._ended_at, now  # when it will, if it takes as long as this one
        self._held.append((updates, now))
        if next_at <= self._told_at + TELL_SECONDS and not self._is_pressing(updates):
            return
        self._told_at = now
        scheduler, limits, holding = self._scheduler, self.limits, self._scheduler.holding
        load = Load(
            num_running=len(holding),
            num_waiting=len(scheduler.waiting),
            kv_usage=sum(request.num_reserved for request in holding) * limits.row_bytes / limits.kv_bytes,
            num_preempted=scheduler.num_preempted,
        )
        assert self._asyncio is not None, "start comes first"
        held, self._held = self._held, []
        self._asyncio.call_soon_threadsafe(self._deliver, held, load)

    def _is_pressing(self, updates: list[Update]) -> bool:
        """Whether a request has just begun or ended, or the next step may be long."""
        if self._scheduler.reader is not None or self._scheduler.waiting:
            return True
        return any(update.state.has_ended or _is_first(update) for update in updates)

    def _deliver(self, held: list[tuple[list[Update], float]], load: Load) -> None:
        self.load = load
        for updates, now in held:
            for update in updates:
                ticket = self._tickets.get(update.request)
                if ticket is not None:
                    ticket.put(update)
                if update.state.has_ended:
                    self._tickets.pop(update.request, None)
            if self.on_updates is not None:
                self.on_updates(updates, now)


def _is_first(update: Update) -> bool:
    """Whether these are the first tokens of an answer, asked before the next step."""
    sequence = update.request.sequence
    assert isinstance(sequence, Decoded)
    return sequence.num_output == len(update.result.token_ids)
