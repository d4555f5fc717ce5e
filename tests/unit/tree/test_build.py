from __future__ import annotations

import itertools
import random

import pytest

from amphista.errors import ConfigError
from amphista.tree.build import build_template, expected_tau
from tests.unit.tree.subtrees import best_value

CASES = [
    [[0.6, 0.2, 0.1], [0.4, 0.3, 0.05]],
    [[0.5], [0.5], [0.5], [0.5]],
    [[0.1, 0.5, 0.2], [0.3, 0.1, 0.4]],  # ranks need not fall
    [[0.9, 0.05], [0.8, 0.1], [0.7, 0.2]],
]


@pytest.mark.parametrize("accuracy", CASES)
@pytest.mark.parametrize("num_nodes", range(1, 7))
def test_no_tree_of_this_size_expects_more(accuracy, num_nodes):
    template = build_template(accuracy, num_nodes)
    assert template.num_nodes <= num_nodes
    assert expected_tau(accuracy, template) == pytest.approx(best_value(accuracy, num_nodes), abs=1e-12)


def test_random_accuracies():
    source = random.Random(5)
    for _ in range(30):
        accuracy = [[source.random() / 3 for _ in range(3)] for _ in range(2)]
        template = build_template(accuracy, 5)
        assert expected_tau(accuracy, template) == pytest.approx(best_value(accuracy, 5), abs=1e-12)


def test_expected_tau_equals_simulated_tau():
    """100000 simulated steps: six standard errors (below 0.02) are exceeded once in 5e8 runs."""
    accuracy = CASES[0]
    template = build_template(accuracy, 6)
    paths = {tuple(path) for path in template.paths()}
    source = random.Random(7)
    total = 0
    for _ in range(100_000):
        path = ()
        for ranks in accuracy:
            at, drawn = source.random(), 0
            bounds = list(itertools.accumulate(ranks))
            drawn = next((rank for rank, bound in enumerate(bounds) if at < bound), None)
            if drawn is None or (*path, drawn) not in paths:
                break
            path = (*path, drawn)
        total += 1 + len(path)
    assert total / 100_000 == pytest.approx(expected_tau(accuracy, template), abs=0.02)


def test_zero_accuracy_is_never_worth_a_node():
    template = build_template([[0.5, 0.0], [0.0, 0.0]], 10)
    assert template.paths() == [[0]]


def test_at_least_the_root():
    assert build_template([[0.5]], 1).num_nodes == 1
    with pytest.raises(ConfigError, match="0 nodes"):
        build_template([[0.5]], 0)
