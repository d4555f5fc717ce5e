from __future__ import annotations

import itertools
import random

import pytest

from amphista.tree.token_tree import TokenTree


def random_tree(seed, num_nodes=20):
    source = random.Random(seed)
    return TokenTree(list(range(100, 100 + num_nodes)), [-1, *(source.randrange(n) for n in range(1, num_nodes))])


@pytest.mark.parametrize("seed", range(3))
def test_mask_depths_and_paths_agree(seed):
    tree = random_tree(seed)
    mask = tree.ancestor_mask()
    for node in range(tree.num_nodes):
        path = tree.path(node)
        assert path[0] == 0 and path[-1] == node and path == sorted(path)
        assert all(tree.parents[child] == parent for parent, child in itertools.pairwise(path))
        assert mask[node].nonzero().squeeze(-1).tolist() == path
        assert tree.depths[node] == len(path) - 1


def test_child_looks_below_one_node_only():
    tree = TokenTree([5, 8, 9, 8, 8], [-1, 0, 0, 1, 2])
    assert [tree.child(0, 8), tree.child(0, 9), tree.child(1, 8), tree.child(2, 8)] == [1, 2, 3, 4]
    assert tree.child(0, 5) is None and tree.child(3, 8) is None and tree.child(1, 9) is None


def test_root_alone():
    tree = TokenTree([5], [-1])
    assert (tree.tokens, tree.parents, tree.depths, tree.num_nodes) == ([5], [-1], [0], 1)
    assert tree.ancestor_mask().tolist() == [[True]]


@pytest.mark.parametrize(
    ("tokens", "parents"),
    [
        ([1, 2, 2], [-1, 0, 0]),  # two siblings with one token
        ([1, 2, 3], [-1, 2, 0]),  # a child before its parent
        ([1, 2], [-1, 1]),  # its own parent
        ([1, 2], [-1, -1]),  # two roots
        ([1, 2], [-1]),
        ([1], [0]),
        ([], []),
    ],
)
def test_what_is_no_tree_cannot_be_made(tokens, parents):
    with pytest.raises((AssertionError, IndexError)):
        TokenTree(tokens, parents)
