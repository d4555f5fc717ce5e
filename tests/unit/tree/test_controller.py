"""Whether a sequence's heads are asked when it decodes alone."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from amphista.tree.budget import DraftRow, NodeBudget
from amphista.tree.candidates import NgramDraft
from amphista.tree.controller import FIRST_REST, LONGEST_REST, DraftController
from amphista.tree.learned import Forward
from amphista.tree.tune import Costs

COSTS = Costs([1.0, 1.1, 1.2, 1.3, 1.4], draft=0.2)
ALONE = Forward(1)


def wants(controller, costs, graft=()):
    row = DraftRow(controller, NgramDraft([7] * len(graft), list(graft)), max_depth=9)
    return NodeBudget(costs).whom_to_ask([row], ALONE) == [0]


def record(controller, num_nodes, num_accepted):
    NodeBudget(COSTS).record(controller, num_accepted, num_nodes, Forward(num_nodes), ALONE)


def run(controller, gains, graft=()):
    """Whether the heads were asked in each step; where they are, they bring the next gain."""
    asked = []
    for gain in gains:
        asked.append(wants(controller, COSTS, graft))
        if asked[-1]:
            record(controller, 4, gain)
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
    assert trials[-1] == min(trials) == 1 and max(trials) <= 8


def test_heads_that_pay_are_not_left_alone_for_a_run_of_bad_luck():
    """They bring 0.8 for 0.5, and single drafts scatter by as much."""
    shares = []
    for seed in range(20):
        source = random.Random(seed)
        asked = run(DraftController(), [source.choice([0, 0, 1, 1, 2]) for _ in range(300)])
        shares.append(sum(asked) / len(asked))
    assert min(shares) > 0.7 and sum(shares) / len(shares) > 0.95


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
    assert not any(wants(controller, dear) for _ in range(10))


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_expected_gain_is_the_mean_of_late(share):
    source = random.Random(3)
    controller = DraftController()
    for _ in range(300):
        record(controller, 2, int(source.random() < share))
    assert controller.gain == pytest.approx(share, abs=0.25)
