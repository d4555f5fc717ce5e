"""Heads and graft in one growth, against the slow way: every rooted subtree of all nodes on offer."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from amphista.tree.candidates import Candidates, Graft
from amphista.tree.dynamic import best_first
from amphista.tree.offers import Offers


def offered(probs, graft_probs, graft_tokens):
    tokens = [[10 * depth + rank for rank in range(len(ranks))] for depth, ranks in enumerate(probs, start=1)]
    logs = [[math.log(p) for p in ranks] for ranks in probs]
    return Candidates(tokens, logs, Graft(graft_tokens, [math.log(p) for p in graft_probs]))


def children_plainly(candidates, path):
    """{token: probability} below a path of tokens, by the words of offers.py."""
    depth = len(path)
    heads = {}
    if depth < candidates.num_heads:
        heads = dict(zip(candidates.tokens[depth], map(math.exp, candidates.log_probs[depth]), strict=True))
    graft = candidates.graft
    if graft is None or path != graft.tokens[:depth] or depth >= len(graft.tokens):
        return heads
    token = graft.tokens[depth]
    knows = math.exp(graft.log_probs[depth])
    share = knows + (1 - knows) * heads.pop(token, 0.0)
    return {token: share} | {other: p * (1 - knows) for other, p in heads.items()}


def all_paths(candidates, max_depth):
    """{path: value} of every node but the root."""
    values, level = {}, {(): 1.0}
    for _ in range(max_depth):
        level = {
            (*path, token): value * p
            for path, value in level.items()
            for token, p in children_plainly(candidates, list(path)).items()
        }
        values |= level
    return values


def best_plainly(values, num_nodes):
    """The largest total of a tree of at most `num_nodes` nodes, by trying all sets that hold their prefixes."""
    best = 1.0
    for size in range(1, num_nodes):
        for chosen in itertools.combinations(values, size):
            held = set(chosen)
            if all(path[:-1] in held or len(path) == 1 for path in chosen):
                best = max(best, 1 + math.fsum(values[path] for path in chosen))
    return best


def paths_of(grown):
    paths = [()]
    for token, parent in zip(grown.tokens[1:], grown.parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


@pytest.mark.parametrize("graft_tokens", [[10, 21, 77], [99, 98], [11, 20], [99]])
@pytest.mark.parametrize("seed", range(3))
def test_no_subtree_of_this_size_scores_more(graft_tokens, seed):
    source = random.Random(seed)
    probs = [sorted((source.random() / 2 for _ in range(2)), reverse=True) for _ in range(2)]
    candidates = offered(probs, [source.random() for _ in graft_tokens], graft_tokens)
    values = all_paths(candidates, 4)
    for num_nodes in range(1, 6):
        grown = best_first(7, candidates, num_nodes, 4)
        assert 1 + grown.expected() == pytest.approx(best_plainly(values, num_nodes))
    everything = best_first(7, candidates, 99, 4)
    found = {path: math.exp(score) for path, score in zip(paths_of(everything), everything.scores[1:], strict=True)}
    assert found == pytest.approx(values), "every node once, with its own value"


def test_a_token_both_name_is_offered_once_and_gains_by_it():
    for p, expected in ((0.9, 0.94), (0.1, 0.46)):
        offers = Offers(offered([[0.5, 0.4]], [p], [11]), 5).below(1, on_graft=True)
        assert sorted(offer.token for offer in offers) == [10, 11]
        assert {o.token: math.exp(o.log_prob) for o in offers}[11] == pytest.approx(expected)


def test_no_node_promises_more_than_one_child():
    for p in (0.01, 0.5, 0.99, 1.0):
        below = Offers(offered([[0.7, 0.3]], [p], [99]), 5).below(1, on_graft=True)
        assert math.fsum(math.exp(offer.log_prob) for offer in below) <= 1 + 1e-6


def test_the_graft_goes_deeper_than_the_heads_and_ends_where_it_must():
    candidates = offered([[0.5]], [0.9] * 4, [10, 71, 72, 73])
    assert paths_of(best_first(7, candidates, 99, 9))[-1] == (10, 71, 72, 73)
    assert max(map(len, paths_of(best_first(7, candidates, 99, 2)))) == 2


def test_without_a_graft_nothing_changes():
    plain = Offers(Candidates([[1, 2]], [[-0.1, -2.0]]), 5)
    assert plain.below(1, on_graft=True) == plain.below(1, on_graft=False)
    assert plain.below(2, on_graft=True) == []
