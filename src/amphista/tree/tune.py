"""What a step costs, as data: seconds by rows, measured at some sizes (CaDDTree, arXiv 2606.01813).

Seconds of a forward rise with its rows but need not be convex. What batches add is a few rates: another sequence,
another cached row that is read, another sequence whose heads are asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Seconds of a step: `verify[n - 1]` with n rows, never falling; `draft` more where heads are asked.

    `sequence`: for each further sequence in the forward; `cached_row`: for each cached row it reads beyond `context`,
    which `verify` was measured with; `drafted`: for each further sequence whose heads are asked; `further_round`: where
    heads are asked in rounds, for each behind the first.
    """

    verify: list[float]
    draft: float = 0.0
    sequence: float = 0.0
    cached_row: float = 0.0
    context: int = 0
    drafted: float = 0.0
    further_round: float = 0.0

    @classmethod
    def measured(cls, verify: Mapping[int, float], draft: float = 0.0, *, in_steps: bool = False) -> Costs:
        """From seconds at some sizes, 1 among them; in_steps: a tree between two sizes is padded to the larger one."""
        curve = monotone(dict(sorted(verify.items())))
        return cls(stepped(curve) if in_steps else interpolated(curve), draft)

    @property
    def max_nodes(self) -> int:
        """The most rows whose cost is known: no tree, and no trees of a batch together, grow larger."""
        return len(self.verify)

    def drafting(self, num_asked: int, num_rounds: float) -> float:
        """Seconds of asking the heads of some sequences; a further one takes the same share more of every round."""
        first = self.draft + (num_asked - 1) * self.drafted
        return first * (1 + (num_rounds - 1) * self.further_round / self.draft) if self.draft else first

    def forward(self, num_rows: int) -> float:
        """Seconds of a forward over so many rows; beyond what was measured on a straight line, at the mean slope."""
        beyond = num_rows - len(self.verify)
        return self.verify[num_rows - 1] if beyond <= 0 else self.verify[-1] + beyond * self._slope

    def forwards(self, num_rows: np.ndarray) -> np.ndarray:
        """The same of several numbers of rows."""
        most = len(self.verify)
        seconds: np.ndarray = self._measured[np.minimum(num_rows, most) - 1]
        seconds = seconds + np.maximum(num_rows - most, 0) * self._slope
        return seconds

    @cached_property
    def _measured(self) -> np.ndarray:
        return np.array(self.verify)

    @cached_property
    def _slope(self) -> float:
        return (self.verify[-1] - self.verify[0]) / max(1, len(self.verify) - 1)


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


def chain_scores(log_probs: Sequence[float]) -> list[float]:
    """Log-scores of a chain below the root, the root's first."""
    return list(accumulate(log_probs, initial=0.0))
