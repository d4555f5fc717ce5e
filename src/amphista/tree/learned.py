"""Seconds of a step, as measured once and as corrected by every step since.

log(seconds) is corrected by a sum of terms: one for all steps, one for steps in which heads were asked, and one for
each power of two of rows, straight lines between. Each step moves the terms it holds toward its own error (least mean
squares, Widrow and Hoff, 1960), so a curve that was disturbed when it was stored does not steer for ever. An error
counts at most CLIP: a step that was held up by something else moves little. The term for all moves fastest, since a
machine that slows down as a whole changes nothing about which tree pays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from amphista.tree.tune import Costs

CLIP = 0.25  # of the log: what one step may seem off by
COMMON, ASKED, SHAPE = 0.1, 0.05, 0.1  # share of an error that each kind of term takes


@dataclass(frozen=True)
class Forward:
    """What a step's seconds depend on: rows of the target forward, of how many sequences, cached rows, heads asked.

    `num_rows`: those of prompts and of trees, roots included. `num_cached_rows`: keys and values that attention reads,
    all sequences together. `num_asked`: sequences whose heads drafted.
    """

    num_rows: int
    num_decoding: int = 1
    num_prompts: int = 0
    num_cached_rows: int = 0
    num_asked: int = 0


class StepCosts:
    """Predicts the seconds of steps, and learns from each what was wrong with that."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._common, self._asked = 0.0, 0.0
        self._shape: dict[int, float] = {}  # by the power of two

    def seconds(self, forward: Forward) -> float:
        """Of the step, from asking the heads to the end of its forward."""
        return self.by_rows(forward)(forward.num_rows)

    def by_rows(self, forward: Forward) -> Callable[[int], float]:
        """Seconds of the same step with another number of rows; quick to call."""
        costs, asked = self.costs, forward.num_asked
        beside = (
            costs.sequence * (forward.num_decoding + forward.num_prompts - 1)
            + costs.cached_row * forward.num_cached_rows
        )
        beside += costs.draft + (asked - 1) * costs.drafted if asked else 0.0
        factor = math.exp(self._common + (self._asked if asked else 0.0))
        return lambda num_rows: factor * math.exp(self._bend(num_rows)) * (costs.forward(num_rows) + beside)

    def surprise(self, forward: Forward, seconds: float) -> float:
        """The log of measured over predicted, within CLIP."""
        return max(-CLIP, min(CLIP, math.log(seconds / self.seconds(forward)))) if seconds > 0 else 0.0

    def observe(self, forward: Forward, seconds: float) -> None:
        """Learn from a step that took so many seconds."""
        error = self.surprise(forward, seconds)
        self._common += COMMON * error
        if forward.num_asked:
            self._asked += ASKED * error
        for power, share in _powers(forward.num_rows):
            self._shape[power] = self._shape.get(power, 0.0) + SHAPE * share * error

    def _bend(self, num_rows: int) -> float:
        return sum(share * self._shape.get(power, 0.0) for power, share in _powers(num_rows))


@cache
def _powers(num_rows: int) -> list[tuple[int, float]]:
    """The powers of two around a number of rows, and how near it is to each."""
    whole = num_rows.bit_length() - 1
    share = math.log2(num_rows) - whole
    return [(whole, 1 - share), (whole + 1, share)] if share else [(whole, 1.0)]
