from __future__ import annotations

import math
import random

import pytest

from amphista.tree.candidates import Candidates
from amphista.tree.dynamic import best_first
from tests.unit.tree.subtrees import best_value


def candidates_of(probs):
    tokens = [[100 * depth + rank for rank in range(len(ranks))] for depth, ranks in enumerate(probs, start=1)]
    return Candidates(tokens, [[math.log(p) if p else -math.inf for p in ranks] for ranks in probs])


def random_probs(seed, widths):
    source = random.Random(seed)
    return [sorted((source.random() / width for _ in range(width)), reverse=True) for width in widths]


@pytest.mark.parametrize("widths", [[3, 3], [2, 2, 2], [4, 1], [1, 5]])
@pytest.mark.parametrize("seed", range(4))
def test_no_subtree_of_this_size_scores_more(widths, seed):
    probs = random_probs(seed, widths)
    for num_nodes in range(1, 7):
        grown = best_first(7, candidates_of(probs), num_nodes, max_depth=9)
        total = math.fsum(math.exp(score) for score in grown.scores)
        assert total == pytest.approx(best_value(probs, num_nodes), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_tree_of_n_is_a_prefix_of_the_tree_of_n_plus_1(seed):
    candidates = candidates_of(random_probs(seed, [6, 6, 6, 6]))
    largest = best_first(7, candidates, 60, max_depth=9)
    assert len(largest.tokens) == 60
    for num_nodes in range(1, 60):
        grown = best_first(7, candidates, num_nodes, max_depth=9)
        assert grown.tokens == largest.tokens[:num_nodes] and grown.parents == largest.parents[:num_nodes]


def test_nesting_holds_under_ties():
    candidates = Candidates([[1, 2, 3]] * 3, [[0.0, 0.0, 0.0]] * 3)
    largest = best_first(7, candidates, 30, max_depth=3)
    for num_nodes in range(1, 30):
        assert best_first(7, candidates, num_nodes, max_depth=3).tokens == largest.tokens[:num_nodes]


def test_scores_are_path_sums_and_never_rise():
    candidates = candidates_of(random_probs(1, [4, 4, 4]))
    grown = best_first(7, candidates, 40, max_depth=3)
    tree = best_first(7, candidates, 40, max_depth=3).tree()
    log_prob = {
        (depth, token): value
        for depth, (tokens, values) in enumerate(zip(candidates.tokens, candidates.log_probs, strict=True), start=1)
        for token, value in zip(tokens, values, strict=True)
    }
    for node in range(tree.num_nodes):
        path = [tree.tokens[i] for i in tree.path(node)[1:]]
        expected = math.fsum(log_prob[depth, token] for depth, token in enumerate(path, start=1))
        assert grown.scores[node] == pytest.approx(expected)
    assert grown.scores == sorted(grown.scores, reverse=True)


@pytest.mark.parametrize("max_depth", range(4))
def test_depth_is_bounded(max_depth):
    tree = best_first(7, candidates_of(random_probs(1, [3, 3, 3])), 50, max_depth).tree()
    assert max(tree.depths) == max_depth
    assert tree.num_nodes == sum(3**depth for depth in range(max_depth + 1)), "all there is, when the budget allows"


def test_impossible_tokens_are_left_out():
    tree = best_first(7, candidates_of([[0.5, 0.0], [0.5, 0.0]]), 50, 9).tree()
    assert tree.tokens == [7, 100, 200]


def test_without_candidates_the_root_stands_alone():
    assert best_first(7, Candidates([], []), 8, 9).tree().tokens == [7]
    assert best_first(7, Candidates([[], []], [[], []]), 8, 9).tree().tokens == [7]
