from __future__ import annotations

import json

import pytest

from amphista.errors import ConfigError
from amphista.tree.candidates import Candidates
from amphista.tree.template import TreeTemplate

PATHS = [[1], [0], [0, 2], [0, 0], [1, 0], [0, 0, 1]]
CANDIDATES = Candidates([[10, 11], [20, 21, 22], [30, 31]], [[-1.0, -2.0], [-1.0, -2.0, -3.0], [-1.0, -2.0]])


def test_paths_come_back_with_parents_before_children():
    template = TreeTemplate.from_paths(PATHS)
    assert template.paths() == [[0], [1], [0, 0], [0, 2], [1, 0], [0, 0, 1]]
    assert template.parents == [-1, 0, 0, 1, 1, 2, 3]
    assert template.ranks == [0, 0, 1, 0, 2, 0, 1]
    assert template.depths == [0, 1, 1, 2, 2, 2, 3]
    assert (template.num_nodes, template.max_depth, template.num_ranks) == (7, 3, 3)


def test_order_repetition_and_the_empty_path_do_not_matter():
    assert TreeTemplate.from_paths([[], *reversed(PATHS), *PATHS]) == TreeTemplate.from_paths(PATHS)


@pytest.mark.parametrize("paths", [[[0, 0]], [[0], [1, 0]], [[0], [0, 0, 0]]])
def test_a_path_without_its_parent_is_refused_by_name(paths):
    with pytest.raises(ConfigError, match="add the path"):
        TreeTemplate.from_paths(paths)


def test_a_negative_rank_is_refused():
    with pytest.raises(ConfigError, match="negative rank"):
        TreeTemplate.from_paths([[0], [0, -1]])


def test_chain():
    assert TreeTemplate.chain(3).paths() == [[0], [0, 0], [0, 0, 0]]
    assert TreeTemplate.chain(0).num_nodes == 1


def test_json_round_trip(tmp_path):
    file = tmp_path / "tree.json"
    file.write_text(json.dumps({"paths": TreeTemplate.from_paths(PATHS).paths()}))
    assert TreeTemplate.read(file) == TreeTemplate.from_paths(PATHS)


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"paths": 3}), json.dumps({"paths": [["a"]]}), "{"])
def test_a_file_that_is_no_template_is_refused_by_name(tmp_path, content):
    file = tmp_path / "tree.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"tree\.json is not a tree template"):
        TreeTemplate.read(file)


def test_an_unreadable_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        TreeTemplate.read(tmp_path / "none.json")


def test_fill_puts_each_rank_token_below_its_parent():
    tree = TreeTemplate.from_paths(PATHS).fill(9, CANDIDATES, max_depth=3)
    paths = [[tree.tokens[i] for i in tree.path(node)] for node in range(tree.num_nodes)]
    assert paths == [[9], [9, 10], [9, 11], [9, 10, 20], [9, 10, 22], [9, 11, 20], [9, 10, 20, 31]]


def test_fill_leaves_out_what_is_too_deep():
    assert TreeTemplate.from_paths(PATHS).fill(9, CANDIDATES, max_depth=2).num_nodes == 6
    assert TreeTemplate.from_paths(PATHS).fill(9, CANDIDATES, max_depth=0).tokens == [9]
    assert TreeTemplate.chain(5).fill(9, CANDIDATES, max_depth=9).num_nodes == 4, "no deeper than there are heads"


def test_fill_leaves_out_missing_ranks_and_everything_below_them():
    few = Candidates([[10], [20, 21, 22], [30, 31]], [[-1.0], [-1.0, -2.0, -3.0], [-1.0, -2.0]])
    tree = TreeTemplate.from_paths(PATHS).fill(9, few, max_depth=3)
    assert tree.tokens == [9, 10, 20, 22, 31]
    assert tree.parents == [-1, 0, 1, 1, 2]
