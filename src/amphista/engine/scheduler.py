"""Scheduler: who waits, who reads a prompt, who decodes. It counts tokens, rows and bytes, and touches no tensor.

Admission goes round robin over keys (tenants), first come first served within one, and passes nobody over: a request
that does not fit yet is waited for. One prompt is read at a time, so that the next one finds its rows. Rows are
reserved ahead in steps of GROWTH. When they run short, kept prefixes go, oldest first; then, for those that decode
already, the youngest is preempted: its rows go, its tokens stay and are read again later.

Laws: what is reserved and kept never exceeds the bytes given; whoever was not refused can end, because the oldest
request is never preempted for another and fits alone; the order of arrival is kept within a key.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from amphista.engine.prefixes import Match, PrefixStore
from amphista.engine.request import Request, State
from amphista.errors import CapacityError, ConfigError, QueueFullError

GROWTH = 256  # rows
LEAST_CHUNK, MOST_CHUNK = 16, 512  # tokens of a prompt read at once
DECAY = 0.98  # of what was measured, with every iteration


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What there is, and how long anybody may wait.

    kv_bytes: for running requests and kept prefixes together. row_bytes: of target and drafter. spare_rows: for a tree
    beside the tokens. max_stall_seconds: that reading a prompt may add to a step of others; or as long as that takes.
    """

    kv_bytes: int
    row_bytes: int
    max_running: int = 16
    spare_rows: int = 48
    max_stall_seconds: float = 0.1
    max_waiting: int | None = 64
    max_wait_seconds: float | None = 60.0

    def __post_init__(self) -> None:
        if min(self.max_running, self.row_bytes) < 1:
            raise ConfigError(
                f"{self.max_running} requests of {self.row_bytes} bytes a row: expected 1 at least of each"
            )
        if self.max_request_len < 1:
            needed = (self.spare_rows + 1) * self.row_bytes
            raise ConfigError(
                f"{self.kv_bytes / 2**20:.3g} MiB are given to keys and values, of which a request takes "
                f"{needed / 2**20:.3g} MiB at least, {self.row_bytes / 2**10:.3g} KiB a token: give more (--kv-gib)"
            )

    @property
    def max_request_len(self) -> int:
        """Tokens of the longest prompt and answer that memory can hold."""
        return self.kv_bytes // self.row_bytes - self.spare_rows


@dataclass(frozen=True)
class Schedule:
    """One iteration: who has waited too long, who gives up their rows, who reads how much, who decodes.

    match: what a reader just admitted begins with.
    """

    expired: list[Request]
    preempted: list[Request]
    reader: Request | None
    match: Match | None
    chunk_len: int
    running: list[Request]


class Scheduler:
    """Plans iterations for requests within limits.

    num_readable: tokens of a prompt that may be read within so many seconds beside a step of so many sequences.
    """

    def __init__(
        self, limits: Limits, num_readable: Callable[[float, int], float], prefixes: PrefixStore | None = None
    ) -> None:
        self.limits, self._num_readable = limits, num_readable
        self.prefixes = prefixes or PrefixStore(limits.kv_bytes)
        self.running: list[Request] = []
        self.reader: Request | None = None
        self.num_preempted = 0
        self._queues: dict[Hashable, deque[Request]] = {}  # none empty; the next key's first
        self._numbers = itertools.count()
        self._num_tokens, self._seconds = 0.0, 0.0  # measured, older ones weighing less

    @property
    def waiting(self) -> list[Request]:
        """Those without rows, by key."""
        return [request for queue in self._queues.values() for request in queue]

    @property
    def holding(self) -> list[Request]:
        """Those with rows, oldest first."""
        return sorted([*self.running, *([self.reader] if self.reader else [])], key=lambda request: request.number)

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._queues or self.running or self.reader)

    @property
    def free_bytes(self) -> int:
        """What is neither reserved nor kept."""
        num_reserved = sum(request.num_reserved for request in self.holding)
        return self.limits.kv_bytes - num_reserved * self.limits.row_bytes - self.prefixes.num_bytes

    @property
    def retry_after(self) -> float:
        """Seconds in which what waits may be decoded, by what was measured; 1 at least."""
        queued = sum(min(request.sequence.num_left, GROWTH) for request in self.waiting)
        return max(1.0, queued * self._seconds / self._num_tokens) if self._num_tokens else 1.0

    def submit(self, request: Request) -> None:
        """Queue a request. raises CapacityError where it could never end, QueueFullError where too many wait."""
        num_tokens = len(request.sequence.token_ids) + request.sequence.num_left
        num_waiting, limits = sum(map(len, self._queues.values())), self.limits
        request.state = State.FAILED  # unless it passes
        if num_tokens > limits.max_request_len:
            raise CapacityError(
                f"prompt and answer may have {num_tokens} tokens, but the memory given to keys and values holds "
                f"{limits.max_request_len}: shorten the prompt, lower the token limit or give more memory"
            )
        num_free = max(0, limits.max_running - len(self.holding))  # who gets one of these does not wait
        if limits.max_waiting is not None and num_waiting >= limits.max_waiting + num_free:
            seconds = self.retry_after
            raise QueueFullError(f"{num_waiting} requests wait already: try again in {seconds:.0f} s", seconds)
        request.state, request.number = State.WAITING, next(self._numbers)
        self._queues.setdefault(request.key, deque()).append(request)

    def plan(self, now: float) -> Schedule:
        """The next iteration; `now` in seconds. Changes of state are made here; to move rows is the caller's."""
        expired, preempted, match = self._expire(now), self._grow(), self._admit()
        if self.reader is not None and self.reader.admitted_at is None:
            self.reader.admitted_at = now
        return Schedule(expired, preempted, self.reader, match, self._chunk_len(), list(self.running))

    def advance(self, request: Request) -> bool:
        """Note that a request has been stepped; returns whether its answer has ended (`end` is the caller's)."""
        if request.sequence.is_finished:
            return True
        if request is self.reader and request.sequence.num_unread == 0:
            self.reader = None
            self.running.append(request)
            request.state = State.RUNNING
            if request.namespace is not None:
                self.prefixes.share(request.namespace, request.sequence.rows)
        return False

    def end(self, request: Request, state: State) -> None:
        """Take a request out for good, wherever it is; the rows of a finished one are kept where there is room."""
        self._take_out(request)
        request.state = state
        if state is State.FINISHED and request.namespace is not None:
            self.prefixes.keep(request.namespace, request.sequence.rows)
            while self.free_bytes < 0:  # a cache may be larger than what was reserved for it
                self.prefixes.drop_oldest()

    def measured(self, num_tokens: int, seconds: float) -> None:
        """Learn from an iteration how fast answers grow."""
        self._num_tokens = DECAY * self._num_tokens + num_tokens
        self._seconds = DECAY * self._seconds + seconds

    def check_integrity(self) -> None:
        """Raise CapacityError when rows, bytes, places and states disagree."""
        self.prefixes.check_integrity()
        holding, waiting, queues = self.holding, self.waiting, self._queues.values()
        if self.free_bytes < 0 or len(holding) > self.limits.max_running:
            raise CapacityError(f"scheduler: {self.free_bytes} bytes free, {len(holding)} requests hold rows")
        if not all(queue and all(a.number < b.number for a, b in itertools.pairwise(queue)) for queue in queues):
            raise CapacityError("scheduler: a queue is empty or out of order")
        for request in [*holding, *waiting]:
            place = State.PREFILL if request is self.reader else State.RUNNING
            states = [State.WAITING, State.PREEMPTED] if request in waiting else [place]
            if request.state not in states or request.sequence.rows.num_rows > request.num_reserved:
                raise CapacityError(f"scheduler: expected {states} and no row beyond what is reserved: {request}")

    def _expire(self, now: float) -> list[Request]:
        """End whoever has waited too long for a first turn."""
        limit = self.limits.max_wait_seconds
        waiting = [] if limit is None else self.waiting
        late = [r for r in waiting if r.state is State.WAITING and now - r.submitted_at > (limit or 0)]
        for request in late:
            self.end(request, State.FAILED)
        return late

    def _grow(self) -> list[Request]:
        """Reserve rows for the next step of all that decode, oldest first; returns who had to make room."""
        preempted: list[Request] = []
        for request in [request for request in self.holding if request.state is State.RUNNING]:
            if len(request.sequence.token_ids) + self.limits.spare_rows <= request.num_reserved:
                continue  # its reservation lasts another step
            growth = self._num_wanted(request) - request.num_reserved
            while request.state is State.RUNNING and self.free_bytes < growth * self.limits.row_bytes:
                if self.prefixes.num_bytes:
                    self.prefixes.drop_oldest()
                else:
                    preempted.append(self._preempt(self.holding[-1]))
            if request.state is State.RUNNING:
                request.num_reserved += growth
        return preempted

    def _preempt(self, request: Request) -> Request:
        """Put a request back to the front of its queue."""
        self._take_out(request)
        request.state = State.PREEMPTED
        self.num_preempted += 1
        self._queues.setdefault(request.key, deque()).appendleft(request)
        return request

    def _admit(self) -> Match | None:
        """Let the next request in where nobody reads and there are a slot and rows; returns what it begins with."""
        if self.reader is not None or len(self.running) >= self.limits.max_running or not self._queues:
            return None
        key, queue = next(iter(self._queues.items()))
        request = queue[0]
        num_rows = self._num_wanted(request)
        num_bytes = num_rows * self.limits.row_bytes
        if self.free_bytes + self.prefixes.num_bytes < num_bytes:
            return None
        self._take_out(request)
        if queue:
            self._queues[key] = self._queues.pop(key)  # the other keys first
        namespace, token_ids = request.namespace, request.sequence.token_ids
        match = None if namespace is None else self.prefixes.find(namespace, token_ids)
        if match is not None and not match.is_copy:
            self.prefixes.forget(match.rows)
        while self.free_bytes < num_bytes:
            dropped = self.prefixes.drop_oldest()
            if match is not None and dropped is match.rows:  # the last to go, having just been used
                match = replace(match, is_copy=False)
        self.reader, request.state, request.num_reserved = request, State.PREFILL, num_rows
        return match

    def _num_wanted(self, request: Request) -> int:
        """Rows to reserve: for its tokens, those to come for a while, and a tree."""
        sequence = request.sequence
        return len(sequence.token_ids) + min(sequence.num_left, GROWTH) + self.limits.spare_rows

    def _chunk_len(self) -> int:
        """The longest chunk that keeps within the stall limit while anybody decodes."""
        if not self.running:
            return MOST_CHUNK
        readable = self._num_readable(self.limits.max_stall_seconds, len(self.running))
        return int(max(LEAST_CHUNK, min(MOST_CHUNK, readable)))

    def _take_out(self, request: Request) -> None:
        """Free what is reserved for a request, and its place."""
        request.num_reserved = 0
        if request is self.reader:
            self.reader = None
        elif request in self.running:
            self.running.remove(request)
            self.prefixes.forget(request.sequence.rows)
        elif request.key in self._queues:
            self._queues[request.key].remove(request)
            if not self._queues[request.key]:
                del self._queues[request.key]
