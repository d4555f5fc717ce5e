"""Ratios of sums over questions, with 95 % percentile bootstrap intervals: 2,000 resamples of questions, a fixed seed.

Questions are what is drawn at random, so turns and repeats of one stay together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Interval = tuple[float, float]


def bootstrap(
    rows: Mapping[str, Sequence[float]], over: Sequence[int], under: Sequence[int]
) -> tuple[float | None, Interval | None]:
    """The product of the sums of columns `over`, divided by that of columns `under`, and its interval.

    rows: a question's sums. None where there are no rows or a sum to divide by is 0; such resamples are left out.
    """
    if not rows:
        return None, None
    table = np.array(list(rows.values()), dtype=float)
    value = _ratios(table.sum(axis=0)[None], over, under)
    if not len(value):
        return None, None
    draws = np.random.default_rng(0).integers(len(table), size=(RESAMPLES, len(table)))
    low, high = np.percentile(_ratios(table[draws].sum(axis=1), over, under), [2.5, 97.5])
    return float(value[0]), (float(low), float(high))


def _ratios(sums: NDArray[np.float64], over: Sequence[int], under: Sequence[int]) -> NDArray[np.float64]:
    """Of every row of sums that can be divided by."""
    usable = sums[(sums[:, list(under)] > 0).all(axis=1)]
    ratios: NDArray[np.float64] = usable[:, list(over)].prod(axis=1) / usable[:, list(under)].prod(axis=1)
    return ratios


def add_to(sums: dict[str, list[float]], key: str, values: Sequence[float]) -> None:
    """Add one answer's values to its question's."""
    row = sums.setdefault(key, [0.0] * len(values))
    for index, value in enumerate(values):
        row[index] += value
