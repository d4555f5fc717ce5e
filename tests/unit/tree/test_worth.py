"""Drafting that does not pay where several sequences share a step is rested from, and tried again."""

from __future__ import annotations

from amphista.tree.budget import DraftRow, NodeBudget, Plan
from amphista.tree.children import ChildCandidate, GrownNodes, Growth
from amphista.tree.controller import DraftController
from amphista.tree.learned import Forward
from amphista.tree.tune import Costs
from amphista.tree.worth import FIRST_REST, LONGEST_REST, TRIAL, Worth

COSTS = Costs.measured({1: 1.0, 4: 1.2, 16: 1.6, 64: 4.0}, draft=0.1)


def steps_between_trials(worth, won, planning, number):
    """Of so many rests their lengths."""
    found = []
    while len(found) < number:
        for _ in range(TRIAL // 16):
            assert not worth.rests()
            worth.note(16, won, planning)
        length = 0
        while worth.rests():
            length += 1
        worth._num_left = 0  # asked once too often
        found.append(length)
    return found


def test_what_does_not_pay_is_tried_the_more_seldom():
    assert steps_between_trials(Worth(), 0.01, 0.02, 4) == [FIRST_REST, 2 * FIRST_REST, LONGEST_REST, LONGEST_REST]
    assert steps_between_trials(Worth(), -0.01, 0.0, 1) == [FIRST_REST]


def test_what_pays_is_never_rested_from_and_ends_long_rests():
    worth = Worth()
    assert steps_between_trials(worth, 0.02, 0.01, 5) == [0] * 5
    steps_between_trials(worth, 0.0, 0.01, 3)
    assert steps_between_trials(worth, 0.02, 0.01, 1) == [0]
    assert steps_between_trials(worth, 0.0, 0.02, 1) == [FIRST_REST]
    assert steps_between_trials(worth, 0.1, 0.01, 1) == [0]
    assert steps_between_trials(worth, 0.0, 0.02, 2) == [0, FIRST_REST], "after a burst it is given longer"


def test_what_a_rest_left_lying_counts_against_nobody():
    worth = Worth()
    for step in range(TRIAL):
        worth.note(1, 0.02, 5.0 if step == 0 else 0.01)
    assert not worth.rests()


def stepped(budget, number, accepted, planning, drafts):
    """How many of 300 steps of so many sequences rest."""
    plain, num_rested = Forward(number, num_decoding=number), 0
    for _ in range(300):
        rests = budget.rests(plain)
        num_rested += rests
        tree = GrownNodes.root(0)
        if drafts and not rests:
            tree.add(0, ChildCandidate(5, -0.1, on_graft=False))
        rows = [DraftRow(DraftController(), None, 0 if rests else 4) for _ in range(number)]
        plan = Plan(rows, [Growth.of(tree) for _ in rows], [], plain)
        seconds = budget.costs.seconds(plan.forward)
        budget.observe(plan, [[] if rests else accepted] * number, seconds, planning)
    return num_rested


def test_a_batch_rests_by_what_its_drafts_win_and_take():
    """A step of 16 takes 1.6, of 32 rows 2.4: a token more for half of them pays, for none does not."""
    assert stepped(NodeBudget(COSTS), 16, [5], 0.1, drafts=True) == 0
    assert stepped(NodeBudget(COSTS), 16, [], 0.1, drafts=True) > 200
    assert stepped(NodeBudget(COSTS), 16, [], 0.1, drafts=False) > 200, "looking is charged, too"
    assert stepped(NodeBudget(COSTS), 16, [], 0.0, drafts=False) == 0


def test_one_alone_does_not_rest_and_sizes_rest_each_for_itself():
    assert stepped(NodeBudget(COSTS), 1, [], 0.1, drafts=True) == 0
    budget = NodeBudget(COSTS)
    stepped(budget, 16, [], 0.1, drafts=True)
    assert stepped(budget, 4, [5], 0.1, drafts=True) == 0
