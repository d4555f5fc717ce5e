"""Expected tau equals simulated tau: a target that draws each token from the very probabilities that were promised is
played against the trees, and the tokens it accepts come to what the growth expected; for the cost-aware choice no tree
of any shape and size commits more of them per second, by trying all.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest

from amphista.tree.budget import NodeBudget
from amphista.tree.candidates import Candidates, NgramDraft
from amphista.tree.children import NO_RANK, ChildCandidates
from amphista.tree.grow import AutoGrower, ChainGrower, DynamicGrower, StaticGrower
from amphista.tree.template import TreeTemplate
from amphista.tree.tune import Costs
from tests.unit.tree.test_children import all_paths, best_plainly, children_plainly, with_paths

COSTS = {
    "cheap": Costs([1.0, 1.02, 1.04, 1.06, 1.08, 1.1], draft=0.1),
    "stairs": Costs([1.0, 1.35, 1.35, 1.35, 1.8, 1.8], draft=0.2),
    "dear": Costs([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], draft=0.3),
}
GROWERS = {
    "dynamic": DynamicGrower(6),
    "chain": ChainGrower(),
    "static": StaticGrower(TreeTemplate.from_paths([[0], [1], [0, 0], [0, 1], [0, 0, 0]])),
    **{f"auto-{name}": AutoGrower(costs) for name, costs in COSTS.items()},
}


KINDS = ["heads", "heads+graft", "paths", "paths+graft"]


def random_candidates(seed, kind):
    source = random.Random(seed)
    probs = [sorted((source.random() / 2 for _ in range(2)), reverse=True) for _ in range(2)]
    tokens = [[10 * depth + rank for rank in range(2)] for depth in (1, 2)]
    graft = None
    if kind.endswith("graft"):
        graft = NgramDraft(
            [source.choice([10, 11, 99]), source.choice([20, 88]), 77],
            [math.log(0.3 + 0.6 * source.random()) for _ in range(3)],
        )
    candidates = Candidates(tokens, [[math.log(p) for p in ranks] for ranks in probs], graft)
    return with_paths(candidates, source) if kind.startswith("paths") else candidates


def accepted_once(tree, candidates, source):
    """Draw the target's tokens by what was promised, and walk the tree."""
    node, path = 0, []
    while True:
        draw = source.random()
        bounds = itertools.accumulate(children_plainly(candidates, path).values())
        drawn = sum(draw >= bound for bound in bounds)
        token = [*children_plainly(candidates, path), -1][drawn]
        child = tree.child(node, token)
        if child is None:
            return len(path)
        node, path = child, [*path, token]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GROWERS)
def test_expected_equals_simulated(name, kind):
    source, expected, realised, draws = random.Random(0), 0.0, 0, 400
    for seed in range(12):
        candidates = random_candidates(seed, kind)
        growth = GROWERS[name].grow(7, candidates, 4)
        expected += draws * growth.expected
        realised += sum(accepted_once(growth.tree, candidates, source) for _ in range(draws))
    assert realised == pytest.approx(expected, rel=0.06)
    assert expected > 0 or name == "auto-dear"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COSTS)
def test_no_tree_commits_more_tokens_a_second(name, kind):
    costs, sizes = COSTS[name], set()
    for seed in range(12):
        candidates = random_candidates(seed, kind)
        growth = AutoGrower(costs).grow(7, candidates, 4)
        values = all_paths(candidates, 4)
        best = max(
            best_plainly(values, size) / (costs.draft + seconds) for size, seconds in enumerate(costs.verify, start=1)
        )
        assert (1 + growth.expected) / (costs.draft + costs.verify[growth.tree.num_nodes - 1]) == pytest.approx(best)
        sizes.add(growth.tree.num_nodes)
    assert {"cheap": 6, "stairs": 4, "dear": 1}[name] in sizes


@pytest.mark.parametrize(
    "mutation", ["one-too-many", "draft-forgotten", "probability-of-the-sibling", "paths-forgotten"]
)
def test_mutations_are_seen(mutation, monkeypatch):
    if mutation == "one-too-many":
        monkeypatch.setattr(NodeBudget, "share", lambda *_: [6])
    elif mutation == "draft-forgotten":
        share = NodeBudget.share
        monkeypatch.setattr(
            NodeBudget, "share", lambda budget, rows, scores, _, plain: share(budget, rows, scores, 0, plain)
        )
    elif mutation == "paths-forgotten":
        children = ChildCandidates._children
        monkeypatch.setattr(ChildCandidates, "_children", lambda offers, depth, _: children(offers, depth, NO_RANK))
    else:
        monkeypatch.setattr("amphista.tree.children._joined", lambda heads, *_: heads)
    with pytest.raises(AssertionError):
        for name in COSTS:
            test_no_tree_commits_more_tokens_a_second(name, "paths+graft")
        test_expected_equals_simulated("dynamic", "paths+graft")
