"""SlotBatch: any number of jobs answered plainly in the slots of a GPU (`slots.py`), in the caller's thread.

A slot is filled again as soon as its answer is seen to have ended. The host reads a block of steps while the next one
runs, so an answer that has ended runs on for two blocks at most.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from amphista.engine.batch import Job
from amphista.engine.loops import loop_free_length
from amphista.engine.params import FinishReason
from amphista.engine.slots import Slots, Start
from amphista.errors import CapacityError
from amphista.target.lean import LeanModel
from amphista.target.pages import free_bytes

SHARE_OF_FREE_MEMORY = 0.7  # for keys and values
Tag = TypeVar("Tag")
Follow = Callable[[Job[Tag], list[int], FinishReason], Job[Tag] | None]


@dataclass
class _Open(Generic[Tag]):
    job: Job[Tag]
    output_ids: list[int] = field(default_factory=list)


class SlotBatch(Generic[Tag]):
    """Answers up to `batch_size` jobs at a time, fewer where memory is short; each has `num_rows` tokens at most."""

    def __init__(self, model: LeanModel, end_ids: frozenset[int], batch_size: int, num_rows: int) -> None:
        """raises CapacityError where not one slot fits into the device's memory."""
        cells = 2 * len(model.layers) * model.num_key_value_heads * model.head_size
        room = SHARE_OF_FREE_MEMORY * free_bytes(model.device)
        num_slots = min(batch_size, math.floor(room / (cells * num_rows * model.dtype.itemsize)))
        if num_slots < 1:
            raise CapacityError(
                f"no room for one answer of {num_rows} tokens on {model.device}: give a smaller max_len"
            )
        self._slots, self._end_ids = Slots(model, num_slots, num_rows), end_ids
        self._open: list[_Open[Tag] | None] = [None] * num_slots
        self.num_tokens = 0

    def run(self, jobs: Iterable[Job[Tag]], follow: Follow[Tag]) -> Iterator[None]:
        """Answer all jobs; yields after each block.

        follow: called with each job as it ends, its output ids and why; what it returns (the next turn of a
        conversation) comes before all others.
        """
        waiting, next_turns = iter(jobs), deque[Job[Tag]]()
        before: tuple[list[_Open[Tag] | None], Callable[[], tuple[Any, Any]]] | None = None
        while True:
            self._fill(next_turns, waiting)
            running = list(self._open) if any(self._open) else None
            queued = None if running is None else (running, self._slots.run_block())
            if before is not None:
                for job, output_ids, reason in self._ended(*before):
                    following = follow(job, output_ids, reason)
                    if following is not None:
                        next_turns.append(following)
            before = queued
            if queued is None and not next_turns and not any(self._open):
                return
            yield

    def _fill(self, next_turns: deque[Job[Tag]], waiting: Iterator[Job[Tag]]) -> None:
        starts = []
        for slot, taken in enumerate(self._open):
            if taken is None:
                job = next_turns.popleft() if next_turns else next(waiting, None)
                if job is None:
                    break
                self._open[slot] = _Open(job)
                starts.append(Start(slot, job.prompt_ids, job.params.temperature, job.params.seed or 0))
        self._slots.fill(starts)

    def _ended(
        self, running: list[_Open[Tag] | None], wait: Callable[[], tuple[Any, Any]]
    ) -> Iterator[tuple[Job[Tag], list[int], FinishReason]]:
        """Take in what a block fed; whose answer ended in it, and leaves its slot."""
        tokens, looped = wait()
        for slot, (one, fed, loops) in enumerate(zip(running, tokens.T.tolist(), looped.T.tolist(), strict=True)):
            if one is None or self._open[slot] is not one:  # empty, or seen to have ended in the block before
                continue
            reason = self._take(one, fed, loops)
            if reason is not None:
                self._open[slot] = None
                yield one.job, one.output_ids, reason

    def _take(self, one: _Open[Tag], fed: list[int], loops: list[bool]) -> FinishReason | None:
        """Add a block's tokens to an answer as far as it goes; why it ends there, if it does."""
        for token, is_loop in zip(fed, loops, strict=True):
            one.output_ids.append(token)
            self.num_tokens += 1
            if token in self._end_ids:
                return FinishReason.STOP
            if is_loop and one.job.cut_loops:
                del one.output_ids[loop_free_length(one.output_ids) :]
                return FinishReason.LOOP
            if len(one.output_ids) == one.job.params.max_new_tokens:
                return FinishReason.LENGTH
        return None
