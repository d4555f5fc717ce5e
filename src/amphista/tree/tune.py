"""How large a tree pays: expected tokens over measured costs (CaDDTree, arXiv 2606.01813). Both come in as data.

A step over n rows commits 1 + gain(n) tokens in T_draft + T_verify(n). Best-first growth is nested, so one growth holds
the best tree of every size, and the step takes the size with the most tokens per second. T_verify is measured, rises
but need not be convex, so all sizes are looked at. Where the root alone is best, the step is plain decoding.

Whether to ask the heads at all has to be known before their word: `DraftController` keeps how much they
have given lately.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Costs:
    """Seconds of a step: `verify[n - 1]` with a tree of n nodes, never falling; `draft` more where heads are asked."""

    verify: list[float]
    draft: float = 0.0

    @classmethod
    def measured(cls, verify: Mapping[int, float], draft: float = 0.0, *, in_steps: bool = False) -> Costs:
        """From seconds at some sizes, 1 among them; in_steps: a tree between two sizes is padded to the larger one."""
        curve = monotone(dict(sorted(verify.items())))
        return cls(stepped(curve) if in_steps else interpolated(curve), draft)

    @property
    def max_nodes(self) -> int:
        """The largest tree whose cost is known."""
        return len(self.verify)


NOTHING_PAYS = Costs([1.0])


def monotone(values: Mapping[int, float]) -> dict[int, float]:
    """The closest curve that never falls (least squares; pool adjacent violators): noise may not favour a larger tree.

    Keys are ascending.
    """
    blocks: list[tuple[float, int]] = []  # mean, how many
    for value in values.values():
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks.pop(-2), blocks.pop()
            blocks.append(((a * m + b * n) / (m + n), m + n))
    means = [mean for mean, count in blocks for _ in range(count)]
    return dict(zip(values, means, strict=True))


def interpolated(values: Mapping[int, float]) -> list[float]:
    """Values at every size from the first (which is 1) to the last, straight lines between; keys are ascending."""
    points = list(values.items())
    curve = [points[0][1]]
    for (left, low), (right, high) in pairwise(points):
        curve += [low + (high - low) * step / (right - left) for step in range(1, right - left + 1)]
    return curve


def stepped(values: Mapping[int, float]) -> list[float]:
    """At every size from 1 to the last the value of the next given one; keys are ascending."""
    sizes = [0, *values]
    return [
        value for (left, right), value in zip(pairwise(sizes), values.values(), strict=True) for _ in range(left, right)
    ]


def best_size(scores: Sequence[float], costs: Costs, *, drafted: bool) -> int:
    """How many of the first nodes to verify: scores[i] is the log-score of node i, the root's is 0 and comes first."""
    fixed = costs.draft if drafted else 0.0
    best, best_rate, tokens = 1, 0.0, 0.0
    for size, (score, seconds) in enumerate(zip(scores, costs.verify, strict=False), start=1):
        tokens += math.exp(score)
        rate = tokens / (fixed + seconds)
        if rate > best_rate:
            best, best_rate = size, rate
    return best


def chain_scores(log_probs: Sequence[float]) -> list[float]:
    """Log-scores of a chain below the root, the root's first."""
    return list(accumulate(log_probs, initial=0.0))


MEMORY = 0.94  # what a past draft still counts after each further one: about the last 16 decide
FIRST_GAIN, FIRST_NODES, FIRST_WEIGHT = 0.8, 4, 4.0  # before anything is known: drafting is worth a try
FIRST_REST, LONGEST_REST = 16, 128  # plain steps before the heads are tried again; twice as many after each failure
PROBE = 4  # drafts of one trial
FADING = 0.3  # what is left of the old evidence then


class DraftController:
    """Decides in each step of one sequence whether the heads are asked, by what asking has brought lately.

    That is accepted tokens, and seconds for their rows, counted over the steps in which the
    heads were asked and no n-gram draft was right, which is what they are asked for.
    """

    def __init__(self) -> None:
        self._weight, self._gain = FIRST_WEIGHT, FIRST_WEIGHT * FIRST_GAIN
        self._rows: float | None = None  # seconds of their rows, times weight; the first is taken from the costs
        self._rested, self._rest, self._trial = 0, FIRST_REST, 0

    @property
    def gain(self) -> float:
        """Accepted tokens a draft."""
        return self._gain / self._weight

    def wants_heads(self, costs: Costs, graft_log_probs: Sequence[float]) -> bool:
        """Whether asking them is likely to be faster than the graft, or nothing, alone. To be called once a step."""
        scores = chain_scores(graft_log_probs)
        size = best_size(scores, costs, drafted=False)
        alone = sum(map(math.exp, scores[:size]))
        missed = 1 - (math.exp(scores[1]) if size > 1 else 0.0)  # how likely the heads will be needed
        seconds, extra = costs.verify[size - 1], costs.draft + self._row_seconds(costs)
        if (alone + missed * self.gain) / (seconds + extra) > alone / seconds:
            return True
        return not self._pays(costs) and self._try_again(missed)  # where they pay in general, they only do not now

    def _pays(self, costs: Costs) -> bool:
        """Whether asking the heads beats plain decoding."""
        return self.gain * costs.verify[0] > costs.draft + self._row_seconds(costs)

    def _try_again(self, missed: float) -> bool:
        if self._trial:
            return missed >= 0.5
        self._rested += 1
        if self._rested < self._rest:
            return False
        self._rested, self._rest, self._trial = 0, min(2 * self._rest, LONGEST_REST), PROBE
        self._fade(FADING)
        return False

    def record(self, costs: Costs, num_nodes: int, num_accepted: int) -> None:
        """Count a step in which the heads were asked and no graft was right."""
        rows = costs.verify[min(num_nodes, costs.max_nodes) - 1] - costs.verify[0]
        self._rows = self._row_seconds(costs) * self._weight
        self._fade(MEMORY)
        self._weight += 1
        self._gain += num_accepted
        self._rows += rows
        if self._trial:
            self._trial -= 1
        elif self._pays(costs):
            self._rested, self._rest = 0, FIRST_REST

    def _row_seconds(self, costs: Costs) -> float:
        if self._rows is None:
            return costs.verify[min(FIRST_NODES, costs.max_nodes) - 1] - costs.verify[0]
        return self._rows / self._weight

    def _fade(self, share: float) -> None:
        self._weight *= share
        self._gain *= share
        if self._rows is not None:
            self._rows *= share
