from __future__ import annotations

import numpy as np
import pytest
import torch

from amphista.accept.sampling import Chooser, Sampling
from amphista.accept.walk import Acceptance, walk
from amphista.tree.token_tree import TokenTree

#          0 (5)
#       1 (7)    2 (8)
#    3 (7)  4 (9)   5 (7)
#             6 (3)
TREE = TokenTree([5, 7, 8, 7, 9, 7, 3], [-1, 0, 0, 1, 1, 2, 4])


class Scripted:
    """Chooses what a row of one-hot logits says, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def choose(self, logits, position, path=()):
        self.asked.append((position, list(path)))
        return int(logits.argmax())


def walked(choices):
    logits = torch.zeros(7, 10)
    for node, token in enumerate(choices):
        logits[node, token] = 1
    chooser = Scripted()
    return walk(TREE, logits, chooser, root_position=40), chooser.asked


@pytest.mark.parametrize(
    ("choices", "path", "accepted", "pending"),
    [
        ([6, 0, 0, 0, 0, 0, 0], [0], [], 6),  # nothing fits
        ([7, 2, 0, 0, 0, 0, 0], [0, 1], [7], 2),
        ([8, 7, 7, 0, 0, 4, 0], [0, 2, 5], [8, 7], 4),
        ([7, 9, 0, 0, 3, 0, 1], [0, 1, 4, 6], [7, 9, 3], 1),  # to the deepest leaf
        ([7, 8, 0, 0, 0, 0, 0], [0, 1], [7], 8),  # 8 is elsewhere in the tree, but no child of node 1
    ],
)
def test_follows_the_targets_choices(choices, path, accepted, pending):
    found, asked = walked(choices)
    assert found == Acceptance(path, accepted, pending)
    assert found.tokens == [*accepted, pending] and found.num_accepted == len(accepted)
    assert asked == [(41 + depth, accepted[:depth]) for depth in range(len(path))]


def test_cut_keeps_the_first_tokens():
    whole = Acceptance([0, 1, 4, 6], [7, 9, 3], 1)
    assert whole.cut(1) == Acceptance([0], [], 7)
    assert whole.cut(2) == Acceptance([0, 1], [7], 9)
    assert whole.cut(3) == Acceptance([0, 1, 4], [7, 9], 3)
    assert whole.cut(4) is whole and whole.cut(9) is whole
    for num_tokens in range(1, 5):
        assert whole.cut(num_tokens).tokens == whole.tokens[:num_tokens]


class OnlyEven:
    """A grammar of even tokens, which notes what it is told."""

    def __init__(self):
        self.chosen = []

    def allowed(self, index):
        assert index == len(self.chosen)
        return np.arange(10) % 2 == 0

    def chose(self, index, token):
        self.chosen[index:] = [token]


def test_known_choices_are_not_taken_where_a_grammar_has_a_say():
    logits = torch.zeros(7, 10)
    for node, token in enumerate([7, 0, 9, 0, 0, 0, 0]):
        logits[node, token], logits[node, 8] = 2, 1
    chooser = Chooser(Sampling(), [1] * 41)
    chooser.grammar = grammar = OnlyEven()
    taken = walk(TREE, logits, chooser, root_position=40, argmaxes=[7, 0, 9, 0, 0, 0, 0])
    assert taken == Acceptance([0, 2], [8], 8) and grammar.chosen == [8, 8]
    chooser.grammar = None
    assert walk(TREE, logits, chooser, 40, [7, 0, 9, 0, 0, 0, 0]) == Acceptance([0, 1], [7], 0)
