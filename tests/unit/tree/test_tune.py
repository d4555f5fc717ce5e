from __future__ import annotations

import itertools
import math
import random

import pytest

from amphista.tree.budget import best_size
from amphista.tree.candidates import Candidates
from amphista.tree.dynamic import best_first
from amphista.tree.tune import Costs, chain_scores, interpolated, monotone, stepped
from tests.unit.tree.subtrees import best_value


def random_candidates(seed, widths):
    source = random.Random(seed)
    probs = [sorted((source.random() / width for _ in range(width)), reverse=True) for width in widths]
    tokens = [[100 * depth + rank for rank in range(width)] for depth, width in enumerate(widths)]
    return probs, Candidates(tokens, [[math.log(p) for p in ranks] for ranks in probs])


def random_costs(seed, num_nodes):
    """Rising, with jumps: neither convex nor concave."""
    source = random.Random(seed)
    return list(itertools.accumulate((source.choice([0.0, 0.05, 0.4]) for _ in range(num_nodes - 1)), initial=1.0))


@pytest.mark.parametrize("widths", [[3, 3], [2, 2, 2], [4, 1], [1, 5]])
@pytest.mark.parametrize("seed", range(8))
def test_no_tree_of_any_size_commits_more_tokens_per_second(widths, seed):
    probs, candidates = random_candidates(seed, widths)
    for draft in (0.0, 0.3):
        costs = Costs(random_costs(seed + 50, 7), draft)
        grown = best_first(7, candidates, costs.max_nodes, 9)
        size = best_size(grown.scores, costs, drafted=True)
        rate = (1 + grown.expected(size)) / (draft + costs.verify[size - 1])
        every = [best_value(probs, n) / (draft + costs.verify[n - 1]) for n in range(1, grown.num_nodes + 1)]
        assert rate == pytest.approx(max(every))


def test_a_dear_row_before_cheap_ones_is_climbed_over():
    """The curve need not be convex: one more node alone does not pay, three more do."""
    costs = Costs([1.0, 2.0, 2.0, 2.0])
    scores = chain_scores([math.log(0.9)] * 3)
    assert best_size(scores[:2], costs, drafted=False) == 1
    assert best_size(scores, costs, drafted=False) == 4


def test_plain_decoding_where_nothing_pays():
    assert best_size(chain_scores([math.log(0.5)] * 5), Costs([1.0, 1.6, 2.2, 2.8, 3.4, 4.0]), drafted=False) == 1
    assert best_size([0.0], Costs([1.0]), drafted=True) == 1


def test_drafting_that_is_paid_for_is_used():
    """The dearer the draft was, the larger the tree over which it is spread."""
    scores, verify = chain_scores([math.log(0.5)] * 5), [1.0, 1.3, 1.6, 1.9, 2.2, 2.5]
    sizes = [best_size(scores, Costs(verify, draft), drafted=True) for draft in (0.0, 0.5, 2.0, 50.0)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert best_size(scores, Costs(verify, 50.0), drafted=False) == sizes[0]


def test_no_tree_beyond_what_was_measured():
    assert best_size(chain_scores([-0.01] * 9), Costs([1.0, 1.0, 1.0]), drafted=False) == 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([3, 2, 1], [2, 2, 2]),
        ([1, 3, 2, 4], [1, 2.5, 2.5, 4]),
        ([1, 4, 3, 2, 5], [1, 3, 3, 3, 5]),
        ([2], [2]),
    ],
)
def test_the_closest_curve_that_never_falls(values, expected):
    assert list(monotone(dict(enumerate(values))).values()) == expected


@pytest.mark.parametrize("seed", range(5))
def test_no_other_rising_curve_is_closer(seed):
    source = random.Random(seed)
    values = [source.randint(0, 4) for _ in range(5)]
    found = list(monotone(dict(enumerate(values))).values())
    grid = [step / 4 for step in range(17)]
    best = min(
        sum((a - b) ** 2 for a, b in zip(values, curve, strict=True))
        for curve in itertools.combinations_with_replacement(grid, 5)
    )
    assert found == sorted(found)
    assert sum((a - b) ** 2 for a, b in zip(values, found, strict=True)) <= best + 1e-9


def test_straight_lines_between_sizes():
    assert interpolated({1: 1.0, 2: 2.0, 5: 5.0}) == [1, 2, 3, 4, 5]
    assert interpolated({1: 3.0}) == [3.0]
    assert Costs.measured({4: 1.0, 1: 2.0, 2: 3.0}).verify == [2.0, 2.0, 2.0, 2.0], "sorted, then monotone"


def test_beyond_what_was_measured_the_mean_slope_goes_on():
    costs = Costs([1.0, 2.0, 2.0])
    assert [costs.forward(rows) for rows in (1, 3, 5)] == [1.0, 2.0, 3.0]
    assert Costs([1.0]).forward(9) == 1.0
    assert Costs(stepped({1: 1.0, 4: 2.5})).forward(2) == 2.5
