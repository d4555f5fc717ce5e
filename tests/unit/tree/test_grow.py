from __future__ import annotations

import math

import pytest

from amphista.errors import ConfigError
from amphista.tree.budget import DraftRow
from amphista.tree.candidates import Candidates, NgramDraft
from amphista.tree.controller import DraftController
from amphista.tree.dynamic import best_first
from amphista.tree.grow import (
    AutoGrower,
    ChainGrower,
    DynamicGrower,
    Measured,
    StaticGrower,
    check_tree,
    parse_tree,
)
from amphista.tree.learned import Forward
from amphista.tree.template import TreeTemplate
from amphista.tree.tune import Costs

CANDIDATES = Candidates([[10, 11, 12], [20, 21, 22]], [[-0.1, -2.0, -3.0], [-0.2, -1.0, -4.0]])


def test_what_users_write():
    measured = Measured(costs=Costs([1.0, 1.1]))
    assert parse_tree(None, measured) == parse_tree("auto", measured) == AutoGrower(measured.costs)
    assert parse_tree("chain") == ChainGrower()
    assert parse_tree("12") == parse_tree(12) == DynamicGrower(12)


def test_a_template_file(tmp_path):
    file = tmp_path / "tree.json"
    file.write_text('{"paths": [[0], [1]]}')
    assert parse_tree(str(file)) == StaticGrower(TreeTemplate.from_paths([[0], [1]]))


@pytest.mark.parametrize("text", ["", "nonsense", "1.5", "./none.json"])
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigError, match=r"neither auto, chain, a number of nodes, .*nor a template file"):
        parse_tree(text)


@pytest.mark.parametrize("text", [0, "0", "-3"])
def test_less_than_the_root_is_refused(text):
    with pytest.raises(ConfigError, match="at least 1"):
        parse_tree(text)


def test_dynamic():
    grower = DynamicGrower(4)
    assert grower.num_ranks == 3, "no node of a tree of 4 can have a rank beyond the third"
    assert grower.grow(9, CANDIDATES, 5).tree == best_first(9, CANDIDATES, 4, 5).tree()
    assert DynamicGrower(1).grow(9, CANDIDATES, 5).tree.tokens == [9]


@pytest.mark.parametrize(("max_depth", "tokens"), [(0, [9]), (1, [9, 10]), (2, [9, 10, 20]), (7, [9, 10, 20])])
def test_chain(max_depth, tokens):
    tree = ChainGrower().grow(9, CANDIDATES, max_depth).tree
    assert tree.tokens == tokens and tree.parents == list(range(-1, len(tokens) - 1))


def test_static():
    grower = StaticGrower(TreeTemplate.from_paths([[0], [2], [2, 1]]))
    assert grower.num_ranks == 3
    assert grower.grow(9, CANDIDATES, 5).tree.tokens == [9, 10, 12, 21]
    assert grower.grow(9, CANDIDATES, 1).tree.tokens == [9, 10, 12]


@pytest.mark.parametrize("tree", ["chain", 1, 8])
def test_a_drafter_without_heads_leaves_the_root(tree):
    assert parse_tree(tree).grow(9, Candidates([], []), 5).tree.tokens == [9]


def test_static_from_calibration():
    accuracy = [[0.5, 0.2], [0.4, 0.1]]
    grower = parse_tree("static:4", Measured(accuracy=accuracy))
    assert grower.template.paths() == [[0], [1], [0, 0]]
    assert grower.num_ranks == 2


@pytest.mark.parametrize("text", ["--5", "+", "static:", "static:x", "static:-1"])
def test_words_that_are_no_tree(text):
    for read in (parse_tree, check_tree):
        with pytest.raises(ConfigError):
            read(text)


def test_static_needs_nodes_and_accuracies():
    with pytest.raises(ConfigError, match="0 nodes"):
        check_tree("static:0")
    check_tree("static:8")
    with pytest.raises(ConfigError, match="calibrated accuracies"):
        parse_tree("static:8")


def test_auto_needs_costs():
    with pytest.raises(ConfigError, match="measured costs"):
        parse_tree("auto")
    check_tree("auto")


def test_auto_takes_what_pays():
    assert AutoGrower(Costs([1.0] * 40)).grow(9, CANDIDATES, 5).tree.num_nodes == 13, "rows for nothing: all there are"
    assert AutoGrower(Costs([1.0, 3.0, 5.0])).grow(9, CANDIDATES, 5).tree.tokens == [9]
    chain = AutoGrower(Costs([1.0, 1.2, 1.4, 9.0])).grow(9, CANDIDATES, 5)
    assert chain.tree.tokens == [9, 10, 20]
    assert chain.expected == pytest.approx(math.exp(-0.1) + math.exp(-0.3))


def test_auto_asks_for_no_more_ranks_than_it_could_use():
    assert AutoGrower(Costs([1.0] * 5)).num_ranks == 4 and AutoGrower(Costs([1.0] * 64)).num_ranks == 10
    assert AutoGrower(Costs([1.0])).max_depth == 0


def test_auto_learns_from_the_heads_own_steps_only():
    """Where the graft was right, the step says nothing of the heads; nor where they were not asked."""
    grower, graft = AutoGrower(Costs([1.0, 1.1, 1.2], draft=0.1)), NgramDraft([10], [-0.1])
    drafted, grafted = Candidates([[11]], [[-0.5]]), Candidates([[11]], [[-0.5]], graft)
    cases = [(drafted, [], True), (grafted, [11], True), (grafted, [10], False), (Candidates([], []), [], False)]
    for candidates, accepted, counts in cases:
        row = DraftRow(DraftController(), candidates.graft, max_depth=3, pending=9)
        grower.whom_to_ask([row], Forward(num_rows=1))
        before = row.controller.gain
        asked = [0] if candidates.num_heads else []
        plan = grower.grow_batch([row], [candidates], asked, Forward(num_rows=1))
        grower.observe(plan, [accepted], 1.0)
        assert (row.controller.gain != before) is counts


@pytest.mark.parametrize("tree", ["chain", 6, "static:4"])
def test_a_graft_joins_every_kind_of_tree(tree):
    grower = parse_tree(tree, Measured(accuracy=[[0.5, 0.2], [0.4, 0.1], [0.3, 0.1]]))
    graft = NgramDraft([12, 77, 78, 79], [-0.01] * 4)
    tree = grower.grow(9, Candidates(CANDIDATES.tokens, CANDIDATES.log_probs, graft), 5).tree
    assert {12, 77} <= set(tree.tokens)
    assert grower.grow(9, Candidates([], [], graft), 2).tree.tokens == [9, 12, 77], "heads or none, within the depth"
