"""Pace: an engine whose steps are timed, for those who plan the next ones, and those who ask whether it steps at all.

A forward is the time of a plain step (the weights are read once) and what each token of a prompt adds to that.
"""

from __future__ import annotations

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
        self._step_seconds = 0.0
        self._read_seconds, self._num_read = 0.0, 0.0  # beyond plain steps; older ones weigh less

    def step(self, batch: Sequence[Any]) -> Sequence[Any]:
        """One step, timed."""
        num_read = sum(min(sequence.chunk_len, sequence.num_unread) for sequence in batch)
        started = self._clock()
        results = self._engine.step(batch)
        self.stepped_at = self._clock()
        seconds = self.stepped_at - started
        if num_read:
            self._read_seconds = KEPT * self._read_seconds + max(0.0, seconds - self._step_seconds)
            self._num_read = KEPT * self._num_read + num_read
        else:
            known = self._step_seconds or seconds
            self._step_seconds = KEPT * known + (1 - KEPT) * seconds
        return results

    def iteration_seconds(self, chunk_len: int, num_running: int) -> float:
        """Predicted: reading a chunk of so many tokens, then one step of those that decode."""
        token_seconds = self._read_seconds / self._num_read if self._num_read else 0.0
        return self._step_seconds + chunk_len * token_seconds + (self._step_seconds if num_running else 0.0)
