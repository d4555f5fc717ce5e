"""Pace: an engine whose steps are timed, for those who plan the next ones, and those who ask whether it steps at all.

A forward is the time of a step of those that decode (the weights are read once) and what each token of a prompt that
is read beside them adds to that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from amphista.engine.loop import Stepper

KEPT = 0.9  # of what was known, with every step


class PacedEngine:
    """Steps with another engine. `stepped_at`: when the last step ended."""

    def __init__(self, engine: Stepper, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self.stepped_at = clock()
        self._step_seconds: dict[int, float] = {}  # by how many decoded
        self._read_seconds, self._num_read = 0.0, 0.0  # beyond those steps; older ones weigh less

    def step(self, batch: Sequence[Any]) -> Sequence[Any]:
        """One step, timed."""
        num_unread = sum(sequence.num_unread for sequence in batch)
        num_decoding = sum(not sequence.num_unread for sequence in batch)
        started = self._clock()
        results = self._engine.step(batch)
        self.stepped_at = self._clock()
        seconds = self.stepped_at - started
        num_read = num_unread - sum(sequence.num_unread for sequence in batch)  # which may be less than a chunk
        if num_read:
            self._read_seconds = KEPT * self._read_seconds + max(0.0, seconds - self._step(num_decoding))
            self._num_read = KEPT * self._num_read + num_read
        else:
            known = self._step_seconds.get(num_decoding, seconds)
            self._step_seconds[num_decoding] = KEPT * known + (1 - KEPT) * seconds
        return results

    def _step(self, num_decoding: int) -> float:
        """Seconds of a step in which nothing is read, by the nearest number of sequences known."""
        nearest = min(self._step_seconds, key=lambda known: abs(known - num_decoding), default=0)
        return self._step_seconds.get(nearest, 0.0)

    def num_readable(self, seconds: float, num_running: int) -> float:
        """Tokens of a prompt that can be read beside so many sequences in so many seconds or, where a step of theirs
        takes longer, in as long: a slow machine reads as long as it decodes."""
        if not self._read_seconds:
            return math.inf
        return max(seconds, self._step(num_running)) * self._num_read / self._read_seconds
