"""Seconds of a step, as measured once and as corrected by every step since.

log(seconds) is corrected by a sum of terms: one for all steps, one for steps in which heads were asked, and one for
each power of two of rows, straight lines between. They are what is most likely after all steps seen, by a Kalman filter
(1960): the term for all is least trusted, so it takes most of what is new, and a machine that slows down as a whole
changes nothing about which tree pays; what was seen often moves slowly, what was not for long moves at once and else
drifts back to what was stored. So neither a curve that was disturbed when it was stored nor a disturbance since steers
for ever. A step that was held up by something else counts as an error of OUTLIER standard deviations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from statistics import median
from typing import NamedTuple

import numpy as np

from amphista.tree.tune import Costs

POWERS = 14  # of two: 8192 rows and more are alike
COMMON, OTHER = 1.0, 0.3  # how far off, of the log, the term for all steps and each other one may be expected to be
ALIKENESS = 0.7  # correlation of the terms of two neighbouring powers
NOISE = 0.1  # standard deviation of a step's log(seconds)
DRIFT = 3e-4  # share of all that is known which a further step makes stale
OUTLIER = 2.0
TOGETHER = 32  # steps of a kind are learned from, at most: it takes as long as much of a step
ALIKE = 64  # cached rows by which steps may differ and still be weighed by one curve


class Forward(NamedTuple):
    """What a step's seconds depend on: rows of the target forward, of how many sequences, cached rows, heads asked.

    `num_rows`: those of prompts and of trees, roots included. `num_cached_rows`: keys and values that attention reads,
    all sequences together. `num_asked`: sequences whose heads drafted; `num_rounds`: of asking them, one unless drafted
    tokens are read. `num_prompt_rows`: rows of prompts among the rows.
    """

    num_rows: int
    num_decoding: int = 1
    num_prompts: int = 0
    num_cached_rows: int = 0
    num_asked: int = 0
    num_rounds: float = 1
    num_prompt_rows: int = 0


def _prior() -> list[list[float]]:
    """Covariance of all terms: those of neighbouring powers of two are wrong alike."""
    powers = np.arange(POWERS)
    prior = np.diag([COMMON**2] + [OTHER**2] * (1 + POWERS))
    prior[2:, 2:] = OTHER**2 * ALIKENESS ** np.abs(powers[:, None] - powers)
    found: list[list[float]] = prior.tolist()
    return found


_PRIOR = _prior()


class DraftCurve:
    """Seconds of a step in which 0, 1, ... nodes are drafted; from each number of them the least that each node takes
    on the way to any larger number."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.rises = seconds, [math.inf] * len(seconds)
        hull = [len(seconds) - 1]  # of the numbers behind: those that a line from before would touch
        for number in range(len(seconds) - 2, -1, -1):
            rise = self._rise(number, hull[-1])
            while len(hull) > 1 and (further := self._rise(number, hull[-2])) <= rise:
                rise = further
                hull.pop()
            self.rises[number] = rise
            hull.append(number)

    def _rise(self, low: int, high: int) -> float:
        return (self.seconds[high] - self.seconds[low]) / (high - low)


class StepCosts:
    """Predicts the seconds of steps, and learns from each what was wrong with that."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._covariance = list(_PRIOR)
        self._terms = [0.0] * (2 + POWERS)  # for all steps, heads asked, powers of two
        self._curves: dict[tuple[Forward, int], DraftCurve] = {}  # since something was learned last
        self._alike = defaultdict[tuple[int, bool], list[float]](list)  # of steps since, how far off
        self._num_learned = defaultdict[tuple[int, bool], int](int)

    def seconds(self, forward: Forward) -> float:
        """Of the step, from asking the heads to the end of its forward."""
        return self._seconds(forward.num_rows, self._beside(forward), self._common(forward))

    def decoding(self, forward: Forward) -> float:
        """The same without what its prompts take: a draft that is dear beside tokens is no cheaper beside a prompt, and
        holds it up."""
        seconds = self.seconds(forward)
        return float(self._without_prompts(forward, np.array([seconds]))[0]) if forward.num_prompt_rows else seconds

    def _without_prompts(self, forward: Forward, seconds: np.ndarray) -> np.ndarray:
        """Seconds of such steps less what prompts add where nothing is drafted; at least those of tokens alone."""
        alone = forward._replace(num_rows=forward.num_decoding, num_prompts=0, num_asked=0)
        plain = forward._replace(num_rows=forward.num_decoding + forward.num_prompt_rows, num_asked=0)
        return self.seconds(alone) + np.maximum(seconds - self.seconds(plain), 0.0)

    def by_rows(self, forward: Forward) -> Callable[[int], float]:
        """Seconds of the same step with another number of rows; quick to call."""
        return partial(self._seconds, beside=self._beside(forward), common=self._common(forward))

    def _seconds(self, num_rows: int, beside: float, common: float) -> float:
        return math.exp(self._correction(num_rows, common)) * (self.costs.forward(num_rows) + beside)

    def _correction(self, num_rows: int, common: float) -> float:
        below, share = _power(num_rows)
        return common + self._terms[below] * (1 - share) + self._terms[below + 1] * share

    def by_drafts(self, forward: Forward, most: int) -> DraftCurve:
        """Of the same step with 0, 1, ... `most` further rows, without its prompts; cached rows to the next ALIKE."""
        forward = forward._replace(num_cached_rows=-(-forward.num_cached_rows // ALIKE) * ALIKE)
        curve = self._curves.get((forward, most))
        if curve is None:
            rows = np.arange(forward.num_rows, forward.num_rows + most + 1)
            terms = self._common(forward) + np.interp(np.log2(rows), np.arange(POWERS), self._terms[2:])
            seconds = np.exp(terms) * (self.costs.forwards(rows) + self._beside(forward))
            if forward.num_prompt_rows:
                seconds = self._without_prompts(forward, seconds)
            curve = self._curves[forward, most] = DraftCurve(seconds.tolist())
        return curve

    def _beside(self, forward: Forward) -> float:
        """Seconds of what is not rows of the forward."""
        costs, asked = self.costs, forward.num_asked
        beside = costs.sequence * (forward.num_decoding + forward.num_prompts - 1)
        beside += costs.cached_row * (forward.num_cached_rows - costs.context)
        return beside + (costs.drafting(asked, forward.num_rounds) if asked else 0.0)

    def _common(self, forward: Forward) -> float:
        """The terms that rows have no part in."""
        return self._terms[0] + (self._terms[1] if forward.num_asked else 0.0)

    def observe(self, forward: Forward, seconds: float) -> None:
        """Learn from the seconds of a step; the more of its kind are known, the more are learned from together, but at
        once from the seldom ones with heads, where they surprise."""
        if not 0 < seconds < math.inf:
            return
        num_rows, is_asked = kind = forward.num_rows, forward.num_asked > 0
        wrong = math.log(seconds / (self.costs.forward(num_rows) + self._beside(forward)))
        alike = self._alike[kind]
        alike.append(wrong)
        num_learned = self._num_learned[kind]
        if len(alike) >= min(TOGETHER, 1 + num_learned // 8) or (
            is_asked
            and num_learned < TOGETHER
            and abs(wrong - self._correction(num_rows, self._common(forward))) > NOISE
        ):
            self._learn(*kind, median(alike), len(alike))
            self._num_learned[kind] += len(alike)
            alike.clear()

    def _learn(self, num_rows: int, is_asked: bool, wrong: float, number: int) -> None:
        """From so many steps, by the median of how far off, of the log, what was measured is.

        In plain lists: behind a forward no array library is in the processor's caches, and each call of one is dear.
        """
        below, share = _power(num_rows)
        holds = [(0, 1.0), (below, 1 - share), (below + 1, share), *[(1, 1.0)] * is_asked]
        spread = [sum(row[term] * part for term, part in holds) for row in self._covariance]
        variance = sum(spread[term] * part for term, part in holds) + NOISE**2 / number
        most = OUTLIER * math.sqrt(variance)
        error = max(-most, min(most, wrong - sum(self._terms[term] * part for term, part in holds)))
        kept = (1 - DRIFT) ** number
        self._terms = [
            kept * (value + moved * error / variance) for value, moved in zip(self._terms, spread, strict=True)
        ]
        for n, (row, prior) in enumerate(zip(self._covariance, _PRIOR, strict=True)):
            gain = spread[n] / variance
            self._covariance[n] = [
                kept**2 * (value - gain * moved) + (1 - kept**2) * start
                for value, moved, start in zip(row, spread, prior, strict=True)
            ]
        self._curves.clear()


@cache
def _power(num_rows: int) -> tuple[int, float]:
    """Which term belongs to the power of two below a number of rows, and how far on the way to the next it is."""
    power = min(math.log2(num_rows), POWERS - 2)
    return 2 + int(power), power - int(power)
