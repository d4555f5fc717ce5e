from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from amphista.accept.chooser import Chooser
from amphista.accept.sampling import Sampling
from amphista.accept.walk import Acceptance, Walk, walk_all
from amphista.errors import TargetError
from amphista.tree.token_tree import TokenTree

#          0 (5)
#       1 (7)    2 (8)
#    3 (7)  4 (9)   5 (7)
#             6 (3)
TREE = TokenTree([5, 7, 8, 7, 9, 7, 3], [-1, 0, 0, 1, 1, 2, 4])


class Recording(Chooser):
    """Chooses the argmax, and remembers what it was asked."""

    is_argmax = False

    def __init__(self):
        super().__init__(Sampling(), [])
        self.asked = []

    def scores(self, logits, position, path=()):
        self.asked.append((position, list(path)))
        return super().scores(logits, position, path)


def one_hot(choices):
    return torch.nn.functional.one_hot(torch.tensor(choices), 10).float()


def walked(choices):
    chooser = Recording()
    (found,) = walk_all([Walk(TREE, one_hot(choices), chooser, root_position=40)])
    return found, chooser.asked


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
    known = [7, 0, 9, 0, 0, 0, 0]
    (taken,) = walk_all([Walk(TREE, logits, chooser, 40, known)])
    assert taken == Acceptance([0, 2], [8], 8) and grammar.chosen == [8, 8]
    chooser.grammar = None
    assert walk_all([Walk(TREE, logits, chooser, 40, known)]) == [Acceptance([0, 1], [7], 0)]


def test_each_goes_its_own_way_beside_others():
    """Ways of several lengths, some known; each is what it is alone, at its own positions, by its own settings."""
    scripts = [[6, 0, 0, 0, 0, 0, 0], [7, 9, 0, 0, 3, 0, 1], [8, 7, 7, 0, 0, 4, 0], [7, 2, 0, 0, 0, 0, 0]]

    def walks():
        for n, script in enumerate(scripts):
            hot = Chooser(Sampling(temperature=1e-3 if n % 2 else 5.0, seed=n), [])
            yield Walk(TREE, one_hot(script), hot, 40 + n)
            yield Walk(TREE, one_hot(script), Recording(), 50 + n)
            yield Walk(TREE, one_hot(script), Chooser(Sampling(), []), 60 + n, script)

    together = walk_all(list(walks()))
    assert together == [walk_all([walk])[0] for walk in walks()]
    assert together[4] == Acceptance([0, 1, 4, 6], [7, 9, 3], 1) and together[3].path == [0, 1, 4, 6]
    assert walk_all([]) == []


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_what_cannot_be_chosen_below_the_root_is_left_to_the_next_step(temperature):
    """It may be behind the answer's end. At the root it is an error, of its own sequence alone."""
    logits, script = one_hot([7, 9, 0, 0, 3, 0, 1]), [7, 9, 0, 0, -1, 0, 1]
    logits[4, 2] = math.nan
    chooser = Chooser(Sampling(temperature=temperature, seed=1), [])
    broken, whole = Walk(TREE, logits, chooser, 40), Walk(TREE, one_hot([7, 9, 0, 0, 3, 0, 1]), chooser, 40)
    known = Walk(TREE, logits, Chooser(Sampling(), []), 40, script)
    found = walk_all([broken, whole, known])
    assert found == [Acceptance([0, 1], [7], 9), Acceptance([0, 1, 4, 6], [7, 9, 3], 1), Acceptance([0, 1], [7], 9)]
    logits[0, 2] = math.nan
    for walk in (Walk(TREE, logits, chooser, 40), Walk(TREE, logits, Chooser(Sampling(), []), 40, [-1] * 7)):
        with pytest.raises(TargetError, match="no finite numbers"):
            walk_all([walk])
