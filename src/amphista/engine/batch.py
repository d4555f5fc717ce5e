"""Batch: answers any number of requests, so many at a time, in the caller's thread.

A place is filled again as soon as its request has ended; prompts are read first, so that steps are full. Nothing of one
request is reused for another unless they name the same namespace (the turns of a conversation).

Law: each answer's tokens are those of its prompt decoded alone, whatever the batch and the order of admission;
exactly so by the choice and its noise. Without the C step the forward of a row beside others may differ in its last
bits: in float32 only a tie could turn on that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from amphista.engine.loop import EngineLoop, Update
from amphista.engine.params import SamplingParams
from amphista.engine.prefixes import PrefixStore
from amphista.engine.request import Request
from amphista.engine.scheduler import Limits, Scheduler
from amphista.engine.sequence import Sequence
from amphista.engine.step import Engine
from amphista.errors import CapacityError, ConfigError
from amphista.target.pages import free_bytes

SHARE_OF_FREE_MEMORY = 0.5  # for keys and values
SHARE_OF_KEPT = 0.125  # of that, for rows of answers that have ended: a next turn comes at once or never
Tag = TypeVar("Tag")


@dataclass(frozen=True)
class Job(Generic[Tag]):
    """A prompt to decode; `tag` is the caller's own and comes back with the result.

    cut_loops: end the answer once it loops (`engine/loops.py`) and keep its loop-free prefix.
    """

    prompt_ids: list[int]
    params: SamplingParams
    tag: Tag
    cut_loops: bool = False
    namespace: Hashable = None


@dataclass(frozen=True)
class Finished(Generic[Tag]):
    """A job whose answer has ended, or failed: then `sequence` holds what had come before."""

    job: Job[Tag]
    sequence: Sequence
    error: BaseException | None = None


class Batch(Generic[Tag]):
    """Decodes up to `batch_size` jobs at a time. kv_bytes: for keys and values, default half of the free memory."""

    def __init__(self, engine: Engine, batch_size: int, *, kv_bytes: int | None = None) -> None:
        if batch_size < 1:
            raise ConfigError(f"a batch of {batch_size}: expected at least 1 sequence")
        self._engine = engine
        self.limits = Limits(
            kv_bytes=int(SHARE_OF_FREE_MEMORY * free_bytes(engine.target.device)) if kv_bytes is None else kv_bytes,
            row_bytes=engine.row_bytes,
            max_running=batch_size,
            spare_rows=engine.max_nodes,
            max_stall_seconds=math.inf,
            max_waiting=None,
            max_wait_seconds=None,
        )
        kept = PrefixStore(int(SHARE_OF_KEPT * self.limits.kv_bytes))
        self.loop = EngineLoop(
            engine, Scheduler(self.limits, lambda seconds, running: math.inf, kept), publish=self._note
        )
        self._ended: list[Update] = []
        self._open: dict[Request, Job[Tag]] = {}
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens decoded so far."""
        return self._num_tokens + sum(_sequence(request).stats.num_tokens for request in self._open)

    def check_memory(self, jobs: Iterable[Job[Tag]]) -> None:
        """Raise CapacityError, before anything is decoded, where as many of these jobs as run at once may not fit."""
        spare, most = self.limits.spare_rows, self._engine.target.spec.max_positions + 1
        rows = sorted(min(len(job.prompt_ids) + job.params.max_new_tokens, most) + spare for job in jobs)
        needed = sum(rows[-self.limits.max_running :]) * self.limits.row_bytes
        if needed > self.limits.kv_bytes:
            raise CapacityError(
                f"a batch of {min(len(rows), self.limits.max_running)} may need {needed / 2**30:.1f} GiB for keys and "
                f"values, {self.limits.kv_bytes / 2**30:.1f} GiB can be given: take a smaller batch_size or max_tokens"
            )

    def run(
        self,
        jobs: Iterable[Job[Tag]],
        follow: Callable[[Finished[Tag]], Job[Tag] | None] = lambda finished: None,
    ) -> Iterator[Finished[Tag]]:
        """Decode all jobs; yields each as it ends.

        follow: called with each result after it was yielded; what it returns takes its place (the next turn of a
        conversation). Jobs are taken from their iterable only when a place is free. raises RequestError for a prompt
        that cannot be decoded.
        """
        waiting = iter(jobs)
        while True:
            while len(self._open) < self.limits.max_running and (job := next(waiting, None)) is not None:
                self._submit(job)
            if not self._open:
                return
            self.loop.step_once()
            ended, self._ended = self._ended, []
            for update in ended:
                sequence = _sequence(update.request)
                finished = Finished(self._open.pop(update.request), sequence, update.error)
                self._num_tokens += sequence.stats.num_tokens
                yield finished
                if (job := follow(finished)) is not None:
                    self._submit(job)

    def _submit(self, job: Job[Tag]) -> None:
        sequence = self._engine.new_sequence(job.prompt_ids, job.params, cut_loops=job.cut_loops)
        self._open[self.loop.submit(sequence, namespace=job.namespace)] = job

    def _note(self, updates: list[Update]) -> None:
        self._ended += [update for update in updates if update.state.has_ended]


def _sequence(request: Request) -> Sequence:
    assert isinstance(request.sequence, Sequence)
    return request.sequence
