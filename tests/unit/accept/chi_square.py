"""Chi-square tests on fixed seeds. Each fails by chance, for freshly drawn seeds, once in 1e9 runs."""

from __future__ import annotations

import math

import numpy as np

FALSE_ALARM = 1e-9


def chi_square_tail(statistic, degrees):
    """P(chi-square > statistic), in closed form for an even number of degrees of freedom."""
    assert degrees % 2 == 0
    half = statistic / 2
    log_terms = [i * math.log(half) - math.lgamma(i + 1) - half for i in range(degrees // 2)]
    return math.fsum(math.exp(term) for term in log_terms)


def assert_fits(counts, probs):
    counts, expected = np.asarray(counts, dtype=float), np.asarray(probs) * np.sum(counts)
    assert expected.min() > 5
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square_tail(statistic, counts.size - 1) > FALSE_ALARM, f"chi-square {statistic:.1f}, {counts.size} bins"
