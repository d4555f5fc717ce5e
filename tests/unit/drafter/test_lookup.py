from __future__ import annotations

import math

import pytest
import torch

from amphista.drafter.checkpoint import load_proposer
from amphista.drafter.lookup import DEEPEST, PRIOR, PRIOR_WEIGHT, Lookup
from amphista.drafter.proposer import SELDOM, Proposer
from amphista.errors import DrafterError
from tests.tiny import always_right

TEXT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]


def test_it_proposes_what_followed_before():
    graft = Lookup().propose(TEXT, 4)
    assert graft.tokens == [4, 5, 6, 7]
    expected = [PRIOR[None][3], PRIOR[None][4], PRIOR[None][4], PRIOR[None][6]]  # 3 tokens agree, then 4, 5, 6
    assert [math.exp(value) for value in graft.log_probs] == pytest.approx(expected)


@pytest.mark.parametrize(("before", "repeats"), [(7, None), (3, True), (4, False)])
def test_what_came_as_it_had_come_before_is_likelier(before, repeats):
    text = [1, 2, before, 8, 9, 1, 2, 3, 5, 6, 1, 2] if repeats is not None else [8, 9, 1, 2, 3, 5, 6, 1, 2]
    graft = Lookup().propose(text, 1)
    assert graft.tokens == [3] and math.exp(graft.log_probs[0]) == pytest.approx(PRIOR[repeats][2])


@pytest.mark.parametrize(("text", "depth"), [([1, 2, 3], 4), ([], 4), ([7], 4), (TEXT, 0)])
def test_nothing_to_say(text, depth):
    assert Lookup().propose(text, depth) is None


def test_depth_is_bounded():
    assert len(Lookup().propose([1, 1], 99).tokens) == DEEPEST


def test_outcomes_move_the_likelihood():
    lookup = Lookup()
    lookup.propose(TEXT, 4)
    lookup.propose([*TEXT, 4, 5, 0], 4)  # right at agreeing lengths 3 and 4, wrong at 5
    prior = PRIOR[None]
    assert lookup.likelihood(3) == pytest.approx((1 + PRIOR_WEIGHT * prior[3]) / (1 + PRIOR_WEIGHT))
    assert (
        lookup.likelihood(4)
        == lookup.likelihood(5)
        == pytest.approx((1 + PRIOR_WEIGHT * prior[4]) / (2 + PRIOR_WEIGHT))
    )
    untouched = [lookup.likelihood(2), lookup.likelihood(6), lookup.likelihood(3, True)]
    assert untouched == pytest.approx([prior[2], prior[6], PRIOR[True][3]])


def test_what_lies_behind_a_mistake_teaches_nothing():
    lookup = Lookup()
    lookup.propose(TEXT, 4)
    lookup.propose([*TEXT, 0, 5, 6, 7], 4)
    assert lookup.likelihood(4) == pytest.approx(PRIOR[None][4]) and lookup.likelihood(3) < PRIOR[None][3]


def test_likelihood_meets_the_truth():
    """A text whose every token follows its predecessor in 3 of 4 cases: expected acceptance becomes realised."""
    source = torch.Generator().manual_seed(0)
    lookup, tokens, expected, realised = Lookup(), [0, 1, 2, 3], 0.0, 0
    for _ in range(3000):
        graft = lookup.propose(tokens, 1)
        usual = (tokens[-1] + 1) % 50
        token = usual if torch.rand((), generator=source) < 0.75 else int(torch.randint(50, (), generator=source))
        if graft is not None and len(tokens) > 500:
            expected += math.exp(graft.log_probs[0])
            realised += graft.tokens[0] == token
        tokens.append(token)
    assert expected == pytest.approx(realised, rel=0.08)


def test_priors_rise():
    for prior in PRIOR.values():
        assert list(prior) == sorted(prior) and list(prior.values()) == sorted(prior.values())
    assert all(PRIOR[False][start] < PRIOR[None][start] < PRIOR[True][start] for start in PRIOR[None])


# -- beside heads -----------------------------------------------------------------------------------------------------


def test_names():
    assert Proposer(use_lookup=True).name == "lookup" and Proposer().name == "none"
    assert Proposer(always_right([1, 2]), use_lookup=True).name == "scripted+lookup"


def test_lookup_alone_has_no_heads():
    proposer = Proposer(use_lookup=True)
    lookup = proposer.new_lookup()
    assert proposer.num_heads == 0 and not proposer.proposes_nothing
    assert proposer.ngrams(lookup, TEXT, 2).tokens == [4, 5] and len(lookup.index) == len(TEXT)
    assert Proposer().new_lookup() is None and Proposer().ngrams(None, TEXT, 2) is None


def test_what_is_looked_for_seldom_is_found_a_few_tokens_later():
    proposer, often = Proposer(use_lookup=True), Lookup()
    lookup, looked = proposer.new_lookup(), []
    for end in range(len(TEXT), len(TEXT) + 3 * SELDOM):
        text = [*TEXT, *TEXT[3:], *TEXT[3:]][:end]
        found, expected = proposer.ngrams(lookup, text, 2, seldom=True), often.propose(text, 2)
        looked.append(found is not None)
        assert found is None or found.tokens == expected.tokens
    assert looked == [True, *[False] * (SELDOM - 1)] * 3


def test_names_that_load(target):
    def load(name):
        return load_proposer(name, target.spec, target.shared, target.fingerprint)

    assert load("lookup").name == load("none+lookup").name == "lookup"
    with pytest.raises(DrafterError, match="no amphista drafter is shipped"):
        load("amphista+lookup")
    with pytest.raises(DrafterError, match="unknown drafter 'nothing'"):
        load("nothing+lookup")
