from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from amphista.drafter.amphista import AmphistaConfig
from amphista.drafter.base import Calibration, DrafterConfig
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.drafter.ranked import Ranked
from amphista.errors import ConfigError, DrafterError
from amphista.target.spec import LogitTransform, SharedWeights
from tests.tiny import shaken

IDS = torch.tensor([7, 290, 3, 55, 120, 0, 299, 42])
SORTED = [0, 3, 7, 42, 55, 120, 290, 299]


def medusa(target, shared=None, **settings):
    return Medusa(MedusaConfig(num_heads=3, **settings), target.spec, shared or target.shared)


def drafted(target, **settings):
    drafter = medusa(target, draft_vocab=8, **settings)
    drafter.set_draft_ids(IDS)
    return drafter


def biased(target):
    """The tiny target's LM head with a bias, and logits scaled by 3."""
    head = nn.Linear(32, 300)
    head.weight.data = target.shared.head_weight.clone()
    return SharedWeights(target.model.get_input_embeddings(), head, LogitTransform(multiply=3.0))


# -- the draft vocabulary ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lm_head", ["shared", "own"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_draft_logits_are_the_full_logits_of_the_chosen_tokens(target, lm_head, with_bias):
    shared = biased(target) if with_bias else target.shared
    drafter = drafted(target, lm_head=lm_head, shared=shared)
    assert drafter.draft_ids.tolist() == SORTED and drafter.draft_vocab == 8
    states = torch.randn(2, 3, 32)
    expected = shared.project(states)[..., SORTED]
    torch.testing.assert_close(drafter.head_logits(states), expected)
    torch.testing.assert_close(drafter.target_logits(states), expected)
    for k in range(3):
        torch.testing.assert_close(drafter.head_logits(states[:, k], k), expected[:, k])


def test_without_a_draft_vocabulary_all_tokens_are_scored(target):
    drafter = medusa(target)
    assert drafter.draft_ids is None and drafter.draft_vocab == 300
    states = torch.randn(3, 32)
    torch.testing.assert_close(drafter.head_logits(states), target.shared.project(states))


def test_own_heads_are_one_per_depth(target):
    drafter = drafted(target, lm_head="own")
    with torch.no_grad():
        drafter.own_head[1] = 0
    logits = drafter.head_logits(torch.randn(3, 32))
    assert bool((logits[1] == 0).all()) and bool((logits[0] != 0).any()) and bool((logits[2] != 0).any())


def test_a_new_draft_vocabulary_replaces_gathered_rows(target):
    drafter = drafted(target)
    states = torch.randn(3, 32)
    drafter.head_logits(states)
    drafter.set_draft_ids(torch.arange(8))
    torch.testing.assert_close(drafter.head_logits(states), target.shared.project(states)[..., :8])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[:7], "7 draft tokens .* sized for 8"),
        (torch.cat([IDS[:7], IDS[:1]]), "a token twice"),
        (IDS + 1, "beyond the target's 300"),
        (IDS - 1, "beyond the target's 300"),
    ],
)
def test_a_draft_vocabulary_that_cannot_be_is_refused(target, ids, message):
    with pytest.raises(DrafterError, match=message):
        medusa(target, draft_vocab=8).set_draft_ids(ids)


def test_a_drafter_without_a_draft_vocabulary_takes_none(target):
    with pytest.raises(DrafterError, match="sized for 300"):
        medusa(target).set_draft_ids(IDS)


def test_more_draft_tokens_than_the_target_has_are_refused(target):
    with pytest.raises(ConfigError, match="draft_vocab is 301"):
        medusa(target, draft_vocab=301)


# -- ranks and temperatures -------------------------------------------------------------------------------------------


def rank(drafter, logits, num_ranks, temperature=0.0):
    divisors = torch.tensor(drafter.head_temperatures(temperature))[: len(logits), None]
    return Ranked(*drafter.top_ranks((logits / divisors)[None], num_ranks)).candidates([len(logits)])[0]


def test_rank_gives_token_ids_in_descending_probability(target):
    drafter = drafted(target)
    logits = torch.randn(3, 8)
    candidates = rank(drafter, logits, 4)
    for k in range(3):
        order = sorted(range(8), key=lambda i: -float(logits[k, i]))[:4]
        assert candidates.tokens[k] == [SORTED[i] for i in order]
        expected = torch.log_softmax(logits[k], 0)[order].tolist()
        assert candidates.log_probs[k] == pytest.approx(expected, abs=1e-6)


def test_rank_never_gives_more_than_there_is(target):
    drafter = drafted(target)
    assert [len(tokens) for tokens in rank(drafter, torch.randn(3, 8), 50).tokens] == [8, 8, 8]
    assert rank(drafter, torch.randn(3, 8), 0).tokens == [[], [], []]


def test_head_temperatures_follow_the_calibration(target):
    drafter = drafted(target)
    assert drafter.head_temperatures(0.0) == [1, 1, 1]
    assert drafter.head_temperatures(0.5) == [0.5] * 3
    drafter.calibration = Calibration(greedy=[1.0, 1.5, 2.0], sampled=[1.0, 2.0, 4.0])
    assert drafter.head_temperatures(0.0) == [1.0, 1.5, 2.0]
    assert drafter.head_temperatures(0.5) == [0.5, 1.0, 2.0]


def test_rank_divides_by_the_temperature_and_discounts_by_the_coverage(target):
    drafter = drafted(target)
    drafter.calibration = Calibration(greedy=[1.0, 1.5, 2.0], sampled=[1.0, 2.0, 4.0], coverage=0.9)
    logits = torch.randn(3, 8)
    for temperature, divisors in [(0.0, [1.0, 1.5, 2.0]), (0.7, [0.7, 1.4, 2.8])]:
        candidates = rank(drafter, logits, 8, temperature)
        for k in range(3):
            best = torch.log_softmax(logits[k] / divisors[k], 0).max()
            assert candidates.log_probs[k][0] == pytest.approx(float(best) + math.log(0.9), abs=1e-5)
            assert sum(map(math.exp, candidates.log_probs[k])) == pytest.approx(0.9, abs=1e-5)


# -- the two forms ----------------------------------------------------------------------------------------------------


def test_draft_uses_the_last_committed_row(target):
    drafter = shaken(drafted(target))
    state = drafter.start()
    hidden = torch.randn(5, 32)
    drafter.commit(state, hidden[:2], torch.tensor([1, 2]))
    drafter.commit(state, hidden[2:], torch.tensor([3, 4, 5]))
    assert state.num_rows == 5
    states = drafter(hidden[None], torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([4]))[0]
    expected = rank(drafter, drafter.head_logits(states), 3)
    found = drafter.draft(state, 3)
    assert found.tokens == expected.tokens
    drafter.trim(state, 9)
    assert state.num_rows == 5
    drafter.trim(state, 2)
    assert state.num_rows == 2


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (DrafterConfig, {"num_heads": 0}),
        (DrafterConfig, {"lm_head": "mine"}),
        (DrafterConfig, {"draft_vocab": 0}),
        (MedusaConfig, {"num_layers": 0}),
        (MedusaConfig, {"num_heads": 0}),
        (AmphistaConfig, {"num_heads": 0}),
        (AmphistaConfig, {"stages": 3}),
        (AmphistaConfig, {"stage_split": 6}),
        (AmphistaConfig, {"stage_split": -1}),
        (AmphistaConfig, {"slot_mask": "both"}),
        (AmphistaConfig, {"num_encoder_layers": 0}),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(kind, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        kind(**wrong)
