from __future__ import annotations

import pytest

from amphista.errors import ConfigError
from amphista.tree.candidates import Candidates
from amphista.tree.dynamic import dynamic_tree
from amphista.tree.grow import DEFAULT_NUM_NODES, ChainGrower, DynamicGrower, StaticGrower, check_tree, parse_tree
from amphista.tree.template import TreeTemplate

CANDIDATES = Candidates([[10, 11, 12], [20, 21, 22]], [[-0.1, -2.0, -3.0], [-0.2, -1.0, -4.0]])


def test_what_users_write():
    assert parse_tree(None) == DynamicGrower(DEFAULT_NUM_NODES)
    assert parse_tree("chain") == ChainGrower()
    assert parse_tree("12") == parse_tree(12) == DynamicGrower(12)


def test_a_template_file(tmp_path):
    file = tmp_path / "tree.json"
    file.write_text('{"paths": [[0], [1]]}')
    assert parse_tree(str(file)) == StaticGrower(TreeTemplate.from_paths([[0], [1]]))


@pytest.mark.parametrize("text", ["", "nonsense", "1.5", "./none.json"])
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigError, match=r"neither 'chain', a number of nodes, .*nor a template file"):
        parse_tree(text)


@pytest.mark.parametrize("text", [0, "0", "-3"])
def test_less_than_the_root_is_refused(text):
    with pytest.raises(ConfigError, match="at least 1"):
        parse_tree(text)


def test_dynamic():
    grower = DynamicGrower(4)
    assert grower.num_ranks == 3, "no node of a tree of 4 can have a rank beyond the third"
    assert grower.grow(9, CANDIDATES, 5) == dynamic_tree(9, CANDIDATES, 4, 5)
    assert DynamicGrower(1).grow(9, CANDIDATES, 5).tokens == [9]


@pytest.mark.parametrize(("max_depth", "tokens"), [(0, [9]), (1, [9, 10]), (2, [9, 10, 20]), (7, [9, 10, 20])])
def test_chain(max_depth, tokens):
    tree = ChainGrower().grow(9, CANDIDATES, max_depth)
    assert tree.tokens == tokens and tree.parents == list(range(-1, len(tokens) - 1))


def test_static():
    grower = StaticGrower(TreeTemplate.from_paths([[0], [2], [2, 1]]))
    assert grower.num_ranks == 3
    assert grower.grow(9, CANDIDATES, 5).tokens == [9, 10, 12, 21]
    assert grower.grow(9, CANDIDATES, 1).tokens == [9, 10, 12]


@pytest.mark.parametrize("tree", ["chain", 1, 8])
def test_a_drafter_without_heads_leaves_the_root(tree):
    assert parse_tree(tree).grow(9, Candidates([], []), 5).tokens == [9]


def test_static_from_calibration():
    accuracy = [[0.5, 0.2], [0.4, 0.1]]
    grower = parse_tree("static:4", accuracy)
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
