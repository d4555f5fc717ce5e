"""Heads and graft in one growth, against the slow way: every rooted subtree of all nodes on offer."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from amphista.tree.candidates import Candidates, ConditionalRanks, NgramDraft
from amphista.tree.children import ChildCandidates
from amphista.tree.dynamic import best_first
from amphista.tree.template import TreeTemplate


def offered(probs, graft_probs, graft_tokens):
    tokens = [[10 * depth + rank for rank in range(len(ranks))] for depth, ranks in enumerate(probs, start=1)]
    logs = [[math.log(p) for p in ranks] for ranks in probs]
    return Candidates(tokens, logs, NgramDraft(graft_tokens, [math.log(p) for p in graft_probs]))


def children_plainly(candidates, path):
    """{token: probability} below a path of tokens, by the words of children.py."""
    depth = len(path)
    heads = {}
    if depth < candidates.num_heads:
        heads = dict(zip(candidates.tokens[depth], map(math.exp, candidates.log_probs[depth]), strict=True))
    if heads and depth and candidates.below and path[-1] in candidates.tokens[depth - 1]:
        above = candidates.tokens[depth - 1].index(path[-1])
        if above < len(candidates.below.ranks[depth - 1]):
            ranks, logs = (part[depth - 1][above] for part in (candidates.below.ranks, candidates.below.log_probs))
            heads = {candidates.tokens[depth][r]: math.exp(value) for r, value in zip(ranks, logs, strict=True)}
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


def with_paths(candidates, source, num_parents=2):
    """The same, and below each of the first tokens of a depth both of the next in some order, anyhow likely."""
    ranks = [[source.sample(range(2), 2) for _ in range(num_parents)] for _ in candidates.tokens[1:]]
    logs = [
        [sorted((math.log(source.random() / 2 + 1e-3) for _ in row), reverse=True) for row in rows] for rows in ranks
    ]
    return replace(candidates, below=ConditionalRanks(ranks, logs))


@pytest.mark.parametrize("num_parents", [None, 2, 1], ids=["heads", "paths", "paths-of-the-best"])
@pytest.mark.parametrize("graft_tokens", [[10, 21, 77], [99, 98], [11, 20], [99], [99, 20, 31]])
@pytest.mark.parametrize("seed", range(3))
def test_no_subtree_of_this_size_scores_more(graft_tokens, seed, num_parents):
    source = random.Random(seed)
    depths = range(2 if num_parents is None else 3)
    probs = [sorted((source.random() / 2 for _ in range(2)), reverse=True) for _ in depths]
    candidates = offered(probs, [source.random() for _ in graft_tokens], graft_tokens)
    if num_parents is not None:
        candidates = with_paths(candidates, source, num_parents)
    values = all_paths(candidates, 4)
    for num_nodes in range(1, 6):
        grown = best_first(7, candidates, num_nodes, 4)
        assert 1 + grown.expected() == pytest.approx(best_plainly(values, num_nodes))
    everything = best_first(7, candidates, 99, 4)
    found = {path: math.exp(score) for path, score in zip(paths_of(everything), everything.scores[1:], strict=True)}
    assert found == pytest.approx(values), "every node once, with its own value"


def test_a_token_both_name_is_offered_once_and_gains_by_it():
    for p, expected in ((0.9, 0.94), (0.1, 0.46)):
        offers = ChildCandidates(offered([[0.5, 0.4]], [p], [11]), 5).below(1, on_graft=True)
        assert sorted(offer.token for offer in offers) == [10, 11]
        assert {o.token: math.exp(o.log_prob) for o in offers}[11] == pytest.approx(expected)


def test_no_node_promises_more_than_one_child():
    for p in (0.01, 0.5, 0.99, 1.0):
        below = ChildCandidates(offered([[0.7, 0.3]], [p], [99]), 5).below(1, on_graft=True)
        assert math.fsum(math.exp(offer.log_prob) for offer in below) <= 1 + 1e-6


def test_the_graft_goes_deeper_than_the_heads_and_ends_where_it_must():
    candidates = offered([[0.5]], [0.9] * 4, [10, 71, 72, 73])
    assert paths_of(best_first(7, candidates, 99, 9))[-1] == (10, 71, 72, 73)
    assert max(map(len, paths_of(best_first(7, candidates, 99, 2)))) == 2


def test_without_a_graft_nothing_changes():
    plain = ChildCandidates(Candidates([[1, 2]], [[-0.1, -2.0]]), 5)
    assert plain.below(1, on_graft=True) == plain.below(1, on_graft=False)
    assert plain.below(2, on_graft=True) == []


def test_a_node_has_the_children_of_its_own_token():
    below = ConditionalRanks([[[1, 0], [0]]], [[[-0.1, -3.0], [-0.2]]])
    candidates = Candidates([[10, 11, 12], [20, 21]], [[-0.5, -1.5, -3.0], [-0.4, -2.0]], None, below)
    offers = ChildCandidates(candidates, 5)
    said = [[(o.token, o.log_prob) for o in offers.below(2, on_graft=False, parent_rank=rank)] for rank in range(3)]
    assert said[:2] == [[(21, -0.1), (20, -3.0)], [(20, -0.2)]]
    assert said[2] == [(20, -0.4), (21, -2.0)], "nothing is said of it: the head alone decides"
    assert paths_of(best_first(7, candidates, 4, 2)) == [(10,), (10, 21), (11,)]


def test_children_come_best_first_whatever_the_places_of_tokens():
    """Of a drafter that knows paths tokens keep their places where noise has moved their probabilities."""
    below = ConditionalRanks([[[0], [1], [0]]], [[[-0.3], [-0.2], [-0.1]]])
    candidates = Candidates([[10, 11, 12], [20, 21]], [[-3.0, -0.2, -1.5], [-2.0, -0.4]], None, below)
    offers = ChildCandidates(candidates, 5).below(1, on_graft=True)
    assert [(offer.token, offer.rank) for offer in offers] == [(11, 1), (12, 2), (10, 0)]
    assert paths_of(best_first(7, candidates, 5, 2)) == [(11,), (11, 21), (12,), (12, 20)]


def test_a_graft_s_token_that_heads_name_keeps_its_children():
    below = ConditionalRanks([[[0], [1]]], [[[-0.1], [-0.1]]])
    graft = NgramDraft([11, 21], [math.log(0.5), math.log(0.5)])
    grown = best_first(7, Candidates([[10, 11], [20, 21]], [[-1.0, -1.0], [-1.0, -1.0]], graft, below), 99, 2)
    values = dict(zip(paths_of(grown), grown.scores[1:], strict=True))
    assert math.exp(values[11, 21] - values[11,]) == pytest.approx(0.5 + 0.5 * math.exp(-0.1))
    assert (11, 20) not in values and (10, 20) in values


@pytest.mark.parametrize("seed", range(3))
def test_a_template_s_ranks_are_those_below_the_node_above(seed):
    """Static trees take the same children as grown ones: of a parent, the best are first."""
    source = random.Random(seed)
    candidates = with_paths(Candidates([[10, 11], [20, 21]], [[-1.0, -1.2], [-1.0, -1.5]]), source)
    grown = TreeTemplate.from_paths([[0], [1], [0, 0], [1, 0]]).grow(7, candidates, 5)
    for parent, token in ((10, 3), (11, 4)):
        children = children_plainly(candidates, [parent])
        assert grown.tokens[token] == max(children, key=children.get)
