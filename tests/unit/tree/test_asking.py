"""What a drafter that is asked in rounds has offered, and trees that grow from it."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from amphista.tree.asking import Offered, UsualRounds, named_at
from amphista.tree.candidates import NgramDraft
from amphista.tree.children import NO_RANK
from amphista.tree.dynamic import best_first
from amphista.tree.grow import ChainGrower, DynamicGrower, StaticGrower
from amphista.tree.template import TreeTemplate
from tests.unit.tree.test_children import best_plainly, paths_of


def word(path):
    """{token: probability} of three children below a path, any and always the same; tokens repeat among paths."""
    source = random.Random(str(path))
    return dict(
        zip(source.sample(range(5), 3), sorted((source.random() / 3 for _ in range(3)), reverse=True), strict=True)
    )


def asked(look, max_depth):
    """Rounds of a drafter that says `word`."""
    offered, paths, places = Offered(), [()], [0]
    while True:
        words = [word(path) for path in paths]
        offered.add(places, [list(w) for w in words], [[math.log(p) for p in w.values()] for w in words])
        every = [(*path, token) for path, w in zip(paths, words, strict=True) for token in w]
        places = look(offered) if len(every[0]) < max_depth else []
        if not places:
            return offered.candidates
        paths = [every[place] for place in places]


def all_values(max_depth):
    values, level = {}, {(): 1.0}
    for _ in range(max_depth):
        level = {(*path, token): value * p for path, value in level.items() for token, p in word(path).items()}
        values |= level
    return values


def looks(grower, graft=None):
    from amphista.tree.budget import DraftRow
    from amphista.tree.controller import DraftController
    from amphista.tree.grow import ALONE

    row = DraftRow(DraftController(), graft, 3, 7)
    return lambda offered: grower.look_below([row], [replace(offered.candidates, graft=graft)], [0], ALONE)[0]


@pytest.mark.parametrize("num_nodes", range(2, 8))
def test_looking_below_the_best_misses_no_better_tree(num_nodes):
    grower = DynamicGrower(num_nodes)
    candidates = asked(looks(grower), 3)
    grown = best_first(7, candidates, num_nodes, 3)
    values = all_values(3)
    assert 1 + grown.expected() == pytest.approx(best_of_nested(values, num_nodes))
    assert {path: values[path] for path in paths_of(grown)} == pytest.approx(
        {path: math.exp(score) for path, score in zip(paths_of(grown), grown.scores[1:], strict=True)}
    )
    if num_nodes == 4:
        assert best_of_nested(values, num_nodes) == pytest.approx(
            best_plainly(dict(sorted(values.items(), key=lambda item: -item[1])[:12]), num_nodes)
        )


def best_of_nested(values, num_nodes):
    """A child never has more than its parent: the best tree is the best nodes."""
    return 1 + math.fsum(sorted(values.values(), reverse=True)[: num_nodes - 1])


def test_everything_on_offer_is_a_node_once_with_its_own_value():
    candidates = asked(lambda offered: range(len(offered.deepest)), 3)
    grown = best_first(7, candidates, 999, 3)
    found = {path: math.exp(score) for path, score in zip(paths_of(grown), grown.scores[1:], strict=True)}
    assert found == pytest.approx(all_values(3)) and candidates.num_rounds == candidates.num_heads == 3
    assert [len(named_at(grown, depth)) for depth in (1, 2, 3, 4)] == [3, 9, 27, 0]
    assert named_at(grown, 2, 3) == [node for node in named_at(grown, 2) if node < 3]


def test_a_round_may_give_several_depths():
    offered, found = Offered(2), []
    for _ in range(5):
        offered.add([0], [[4]], [[-1.0]])
        found.append((offered.candidates.num_rounds, offered.candidates.further_round))
    assert found == [(1, False), (1, True), (2, False), (2, True), (3, False)]


def test_below_what_was_not_looked_below_stands_nothing():
    candidates = asked(lambda offered: [1], 2)
    second = list(word(()))[1]
    assert {path[0] for path in paths_of(best_first(7, candidates, 99, 2)) if len(path) == 2} == {second}
    shape = TreeTemplate.from_paths([[0], [1], [0, 0], [1, 0], [1, 2]])
    assert len(shape.grow(7, candidates, 2).tokens) == 5, "[0, 0] has nothing to stand there"


def test_the_likeliest_of_a_round_are_those_of_their_whole_paths():
    offered = Offered()
    offered.add([], [[4, 5]], [[math.log(0.9), math.log(0.05)]])
    offered.add([0, 1], [[1, 2], [1, 3]], [[math.log(0.3), math.log(0.2)], [math.log(0.9), math.log(0.01)]])
    assert offered.likeliest(2) == [0, 1] and offered.likeliest(3) == [0, 1, 2] and offered.deepest == [1, 2, 1, 3]


def test_a_grafts_token_that_heads_name_keeps_its_place():
    """Rounds go on below the graft where heads named it, and not below a token that only the graft names."""
    best = list(word(()))[2]
    for token, goes_on in ((best, True), (77, False)):
        graft = NgramDraft([token, 88], [math.log(0.9), math.log(0.9)])
        seen = []

        def look(offered, graft=graft, seen=seen):
            seen.append(looks(ChainGrower(), graft)(offered))
            return seen[-1]

        candidates = replace(asked(look, 3), graft=graft)
        assert seen[0] == ([2] if goes_on else [])
        grown = best_first(7, candidates, 40, 3)
        on_graft = [node for node in range(grown.num_nodes) if grown.on_graft[node]]
        assert [grown.tokens[node] for node in on_graft] == [7, token, 88]
        assert grown.ranks[on_graft[1]] == (2 if goes_on else NO_RANK) and grown.ranks[on_graft[2]] == NO_RANK
        below = {grown.tokens[node] for node in range(grown.num_nodes) if grown.parents[node] == on_graft[1]}
        assert below == ({88, *word((best,))} if goes_on else {88})


def test_a_static_tree_looks_below_its_inner_nodes_alone():
    shape = TreeTemplate.from_paths([[0], [1], [2], [0, 1], [2, 0], [0, 1, 0]])
    assert shape.inner.paths() == [[0], [2], [0, 1]]
    seen = []

    def look(offered):
        seen.append(looks(StaticGrower(shape))(offered))
        return seen[-1]

    candidates = asked(look, shape.max_depth)
    assert seen == [[0, 2], [1]]
    assert shape.grow(7, candidates, 3).num_nodes == shape.num_nodes


def test_usual_rounds_follow_what_drafts_take():
    usual = UsualRounds()
    assert usual.number == 1
    for _, rounds in itertools.product(range(40), (3,)):
        usual.note(rounds)
    assert usual.number == pytest.approx(3, abs=0.1)
