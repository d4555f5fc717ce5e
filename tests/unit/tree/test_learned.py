from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from amphista.tree.learned import ALIKE, DraftCurve, Forward, StepCosts
from amphista.tree.tune import Costs

COSTS = Costs([1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 1.9, 2.1], draft=0.2, sequence=0.01, cached_row=0.001, drafted=0.05)


def learned(stored, steps):
    costs = StepCosts(stored)
    for forward, seconds in steps:
        costs.observe(forward, seconds)
    return costs


def test_what_a_batch_costs_before_anything_is_learned():
    forward = Forward(5, num_decoding=3, num_prompts=1, num_cached_rows=200, num_asked=2)
    assert StepCosts(COSTS).seconds(forward) == pytest.approx(1.5 + 3 * 0.01 + 200 * 0.001 + 0.2 + 0.05)
    assert StepCosts(COSTS).seconds(Forward(3)) == COSTS.verify[2]
    assert StepCosts(COSTS).by_rows(Forward(1, num_asked=1))(4) == COSTS.draft + COSTS.verify[3]


def test_a_whole_curve_is_what_its_sizes_are_one_by_one():
    source = random.Random(1)
    forwards = [Forward(source.randint(1, 30), num_asked=source.randint(0, 2)) for _ in range(40)]
    costs = learned(COSTS, [(forward, source.uniform(0.5, 5.0)) for forward in forwards])
    beside = Forward(10, 2, 1, num_prompt_rows=8)
    for forward in (Forward(1), Forward(5, 3, 1, 4 * ALIKE, 2), Forward(600, 2, 1), beside):
        expected = [costs.decoding(forward._replace(num_rows=forward.num_rows + drafts)) for drafts in range(13)]
        assert min(expected) > 0
        assert costs.by_drafts(forward, 12).seconds == pytest.approx(expected)


def test_drafts_beside_a_prompt_take_no_less_than_tokens_alone():
    """Not even where larger steps were quicker: times are compared by their ratios."""
    costs = learned(COSTS, [(Forward(16), 50.0), (Forward(64), 5.0)] * 20)
    forward, tokens = Forward(16, 1, 1, num_prompt_rows=15), costs.seconds(Forward(1))
    took = [costs.decoding(forward._replace(num_rows=rows)) for rows in (16, 40, 64)]
    assert min(took) >= tokens > 0 and min(costs.by_drafts(forward, 48).seconds) >= 0.999 * tokens


@pytest.mark.parametrize("seed", range(10))
def test_the_least_rise_is_that_to_any_larger_number(seed):
    source = random.Random(seed)
    seconds = list(itertools.accumulate(source.choice([0.0, 0.1, 0.5, 1.0]) for _ in range(30)))
    rises = [min((seconds[k] - seconds[n]) / (k - n) for k in range(n + 1, 30)) for n in range(29)]
    assert DraftCurve(seconds).rises == [*map(pytest.approx, rises), math.inf]


@pytest.mark.parametrize("factor", [1 / 3, 3.0, 10.0])
def test_another_clock_is_learned_at_once_and_bends_nothing(factor):
    source = random.Random(0)
    forwards = [Forward(rows, num_asked=int(rows > 1)) for rows in (1, 4, 3, 8)] * 3
    truth = StepCosts(COSTS)
    costs = learned(
        COSTS, [(forward, factor * truth.seconds(forward) * math.exp(source.gauss(0, 0.05))) for forward in forwards]
    )
    ratios = [costs.seconds(Forward(rows)) / truth.seconds(Forward(rows)) / factor for rows in range(1, 9)]
    assert min(ratios) > 0.85 and max(ratios) < 1.15


def test_what_is_seen_of_a_size_speaks_more_for_its_neighbours_than_for_others():
    truth = StepCosts(COSTS)
    costs = learned(COSTS, [(Forward(8), 1.5 * truth.seconds(Forward(8)))] * 8)
    close, far = (costs.seconds(Forward(rows)) / truth.seconds(Forward(rows)) for rows in (4, 512))
    assert 1.5 > close > 1.005 * far > 1.3


def test_a_bent_curve_is_straightened_where_it_was_seen():
    bent = replace(COSTS, verify=[seconds * rows**0.53 for rows, seconds in enumerate(COSTS.verify, 1)])
    truth, source = StepCosts(COSTS), random.Random(0)
    forwards = [Forward(source.randint(1, 8), num_asked=source.randint(0, 1)) for _ in range(300)]
    costs = learned(bent, [(f, truth.seconds(f) * math.exp(source.gauss(0, 0.05))) for f in forwards])
    for rows, asked in itertools.product((1, 2, 4, 8), (0, 1)):
        forward = Forward(rows, num_asked=asked)
        assert costs.seconds(forward) == pytest.approx(truth.seconds(forward), rel=0.12)


def test_a_step_that_was_held_up_moves_little():
    truth = StepCosts(COSTS)
    costs = learned(COSTS, [(Forward(rows), truth.seconds(Forward(rows))) for rows in [1, 2, 4] * 20])
    costs.observe(Forward(4), 50 * truth.seconds(Forward(4)))
    assert costs.seconds(Forward(4)) == pytest.approx(truth.seconds(Forward(4)), rel=0.12)
    assert costs.seconds(Forward(1)) == pytest.approx(truth.seconds(Forward(1)), rel=0.08)
    known = costs.seconds(Forward(2))
    for nothing in (0.0, -1.0, math.inf, math.nan):
        costs.observe(Forward(2), nothing)
    assert costs.seconds(Forward(2)) == known


def test_a_machine_that_changes_is_followed_and_what_is_not_seen_returns_to_what_was_stored():
    truth = StepCosts(COSTS)
    costs = learned(COSTS, [(Forward(8), 2 * truth.seconds(Forward(8)))] * 50 + [(Forward(1), 1.0)] * 50)
    bent = costs.seconds(Forward(8))
    assert bent > 1.4 * truth.seconds(Forward(8)) and costs.seconds(Forward(1)) == pytest.approx(1.0, rel=0.02)
    for _ in range(12_000):
        costs.observe(Forward(1), 1.0)
    assert costs.seconds(Forward(8)) == pytest.approx(truth.seconds(Forward(8)), rel=0.05)
    assert learned(COSTS, [(Forward(100_000), 1.0)]).seconds(Forward(100_000)) > 0
