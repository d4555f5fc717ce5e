from __future__ import annotations

import itertools
import math
import random

import pytest

from amphista.tree.candidates import Candidates
from amphista.tree.dynamic import best_first
from amphista.tree.tune import (
    FIRST_REST,
    LONGEST_REST,
    PROBE,
    Costs,
    DraftController,
    best_size,
    chain_scores,
    interpolated,
    monotone,
)
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


# -- whether to ask the heads -----------------------------------------------------------------------------------------

COSTS = Costs([1.0, 1.1, 1.2, 1.3, 1.4], draft=0.2)


def run(controller, gains, graft=()):
    """Whether the heads were asked in each step; where they are, they bring the next gain."""
    asked = []
    for gain in gains:
        asked.append(controller.wants_heads(COSTS, graft))
        if asked[-1]:
            controller.record(COSTS, 4, gain)
    return asked


def test_heads_that_pay_are_always_asked():
    assert all(run(DraftController(), [1, 0, 2, 0, 1, 1, 0, 3] * 20))


def test_heads_that_never_pay_are_soon_left_alone_and_tried_again_ever_more_rarely():
    asked = run(DraftController(), [0] * 2000)
    assert sum(asked[:40]) < 25
    assert 0 < sum(asked[200:]) < 0.06 * 1800
    rests = [len(list(group)) for was_asked, group in itertools.groupby(asked) if not was_asked]
    assert rests[0] == FIRST_REST and rests == sorted(rests[:-1]) + rests[-1:] and max(rests) == LONGEST_REST
    trials = [len(list(group)) for was_asked, group in itertools.groupby(asked) if was_asked][1:]
    assert set(trials) == {PROBE}


def test_heads_that_begin_to_pay_are_found_again():
    asked = run(DraftController(), [0] * 100 + [2] * 200)
    assert sum(asked[:100]) < 50 and all(asked[-100:])


def test_after_good_times_the_first_rest_is_short_again():
    controller = DraftController()
    run(controller, [0] * 600 + [3] * 300)
    asked = run(controller, [0] * 120)
    rests = [len(list(group)) for was_asked, group in itertools.groupby(asked) if not was_asked]
    assert rests[0] == FIRST_REST


def test_a_sure_graft_needs_no_heads_and_that_is_no_verdict_on_them():
    controller = DraftController()
    assert not any(run(controller, [1] * 50, graft=[math.log(0.98)] * 12))
    assert all(run(controller, [1] * 50))


def test_an_unsure_graft_leaves_the_heads_their_turn():
    assert all(run(DraftController(), [1] * 50, graft=[math.log(0.2)] * 12))


def test_dear_heads_are_not_asked():
    controller, dear = DraftController(), Costs([1.0, 1.0, 1.0, 1.0, 1.0], draft=1.5)
    assert sum(controller.wants_heads(dear, []) for _ in range(10)) == 0


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_expected_gain_is_the_mean_of_late(share):
    source = random.Random(3)
    controller = DraftController()
    for _ in range(300):
        controller.record(COSTS, 2, int(source.random() < share))
    assert controller.gain == pytest.approx(share, abs=0.25)
