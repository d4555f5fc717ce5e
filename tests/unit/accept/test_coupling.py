"""What noise says about drafts: honest probabilities, the target's own choice where the drafter knows its logits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from amphista.accept import coupling
from amphista.accept.chooser import Chooser
from amphista.accept.coupling import coupled, coupled_graft, ranks_to_name
from amphista.accept.draw import gumbel_noise
from amphista.accept.sampling import Sampling
from amphista.native import build, noise
from amphista.tree.candidates import Candidates, ConditionalRanks, NgramDraft

VOCAB = 40


def candidates_of(logits: torch.Tensor, divisor: float, num_ranks: int = VOCAB) -> Candidates:
    """What a drafter says of the best token, depth by depth: logits [K, V]."""
    best = torch.log_softmax(logits / divisor, -1).topk(num_ranks)
    return Candidates(best.indices.tolist(), best.values.tolist())


def sampled(temperature: float = 0.8, seed: int = 3) -> Chooser:
    return Chooser(Sampling(temperature=temperature, seed=seed), [])


def test_who_knows_the_logits_knows_the_choice(monkeypatch):
    monkeypatch.setattr(coupling, "NOISE_SHARE", 1.0)
    for start in range(20):
        logits, chooser = torch.randn(3, VOCAB), sampled(seed=start)
        found = coupled(candidates_of(logits, 0.1), chooser, start, [0.1] * 3, 5)
        assert [len(tokens) for tokens in found.tokens] == [5] * 3
        assert [tokens[0] for tokens in found.tokens] == [chooser.choose(logits[k], start + k) for k in range(3)]


@pytest.mark.parametrize(
    ("num_ranks", "temperature", "error"), [(VOCAB, 0.7, 0.02), (VOCAB, 1.4, 0.02), (12, 0.7, 0.05)]
)
def test_probabilities_are_honest(monkeypatch, num_ranks, temperature, error):
    """A drafter errs by Gumbel noise of scale 0.9: what it promises of its three best, and of all, is met."""
    monkeypatch.setattr(coupling, "NOISE_SHARE", 1.0)
    generator, scale, number = np.random.default_rng(0), 0.9, 6000
    promised, met = np.zeros(2), np.zeros(2)
    for trial in range(number):
        guess = generator.normal(0, 1.5, VOCAB)
        truth = torch.tensor(guess + scale * generator.gumbel(size=VOCAB))
        chooser = sampled(temperature, seed=trial)
        found = coupled(candidates_of(torch.tensor(guess)[None], scale, num_ranks), chooser, 9, [scale], num_ranks)
        (tokens,), (log_probs,) = found.tokens, found.log_probs
        assert log_probs == sorted(log_probs, reverse=True) and sorted(tokens) == sorted(set(tokens))
        choice = chooser.choose(truth, 9)
        promised += [sum(map(math.exp, log_probs[:n])) / number for n in (3, num_ranks)]
        met += [(choice in tokens[:n]) / number for n in (3, num_ranks)]
    assert promised == pytest.approx(met, abs=error)


def test_children_are_noised_each_for_itself_and_keep_their_places():
    """Of parents that name as many children or not; tokens stay where they were, for others name their places."""
    tokens, chooser = [[4, 7], [9, 2, 5]], sampled()
    for ranks, log_probs in (
        ([[[0, 2], [1, 2]]], [[[-0.5, -1.0], [-0.2, -3.0]]]),
        ([[[2, 0, 1], [1], []]], [[[-0.5, -1.0, -9.0], [-0.2], []]]),
    ):
        given = Candidates(tokens, [[-0.3, -2.0], [-0.4, -1.4, -2.2]], below=ConditionalRanks(ranks, log_probs))
        found = coupled(given, chooser, 11, [1.0, 1.25], 1)
        assert found.tokens == tokens
        columns = (found.below.ranks[0], found.below.log_probs[0], ranks[0], log_probs[0])
        for places, values, whose, before in zip(*columns, strict=True):
            assert sorted(places) == sorted(whose) and values == sorted(values, reverse=True)
            alone = Candidates([[tokens[1][place] for place in whose]], [before])
            expected = coupled(alone, chooser, 12, [1.25], 9) if whose else alone
            assert [tokens[1][place] for place in places] == expected.tokens[0]
            assert values == pytest.approx(expected.log_probs[0])


def test_an_n_gram_draft_is_noised_token_by_token_but_for_what_is_certain():
    graft, chooser = NgramDraft([4, 7, 9, 9], [0.0, -0.2, -0.7, -0.7], num_forced=1), sampled(temperature=1.0)
    found = coupled_graft(graft, chooser, 20)
    assert found.tokens == graft.tokens and found.num_forced == 1 and found.log_probs[0] == 0.0
    for depth in (1, 2, 3):
        alone = Candidates([[graft.tokens[depth]]], [[graft.log_probs[depth]]])
        assert found.log_probs[depth] == pytest.approx(coupled(alone, chooser, 20 + depth, [1.0], 1).log_probs[0][0])
    assert coupled_graft(graft, Chooser(Sampling(), []), 20) is graft and coupled_graft(None, chooser, 20) is None


def test_greedy_sequences_and_empty_offers_stay_as_they_are():
    given = candidates_of(torch.randn(2, VOCAB), 1.0)
    greedy, nothing = Chooser(Sampling(), []), Candidates([], [])
    assert coupled(given, greedy, 3, [1.0] * 2, 1) is given and coupled(nothing, sampled(), 3, [], 1) is nothing
    assert ranks_to_name([greedy], 10) == 10 and ranks_to_name([greedy, sampled()], 10) == coupling.NUM_RANKS
    assert ranks_to_name([sampled()], 500) == 500


def test_a_token_that_cannot_be_is_not_offered_by_luck():
    given = replace(candidates_of(torch.zeros(1, VOCAB), 1.0), log_probs=[[0.0, *[-math.inf] * (VOCAB - 1)]])
    for seed in range(20):
        found = coupled(given, sampled(30.0, seed), 3, [1.0], 3)
        assert found.tokens[0][0] == given.tokens[0][0] and found.log_probs[0][1:] == [-math.inf] * 2


def test_noise_is_the_choosers_own_whatever_it_has_seen():
    for width in (0, 30, 1000):
        chooser = sampled(seed=8)
        if width:
            chooser.choose(torch.randn(width), 4)
        found = chooser.noise(6, [[29, 3, 3], [], [7]])
        assert np.array_equal(found[0], gumbel_noise(8, 6, 30)[[29, 3, 3]]) and found[1].size == 0
        assert found[2] == gumbel_noise(8, 8, 30)[7]


def test_noise_along_a_path_is_that_of_each_position(monkeypatch):
    chooser, tokens = sampled(seed=8), [3, 700, 3, 29]
    expected = [float(gumbel_noise(8, 6 + n, 1000)[token]) for n, token in enumerate(tokens)]
    build.load()
    assert chooser.noise_along(6, tokens) == expected
    monkeypatch.setattr(noise, "_in_c", lambda *_: False)
    assert chooser.noise_along(6, tokens) == expected


@pytest.mark.parametrize("log_prob", [0.0, -1e-12, -0.3, -2.0, -25.0, -math.inf])
@pytest.mark.parametrize("weight", [1e-9, 0.49, 1.0, 1.4, 1e6])
def test_a_token_alone_is_noised_as_one_in_an_array(log_prob, weight):
    for luck in (-3.0, 0.0, 1.5, 30.0):
        expected = coupling._noised(np.array([[log_prob]]), np.array([[luck]]), np.array([weight]))[0, 0]
        with np.errstate(all="ignore"):
            assert coupling._noised_alone(log_prob, luck, weight) == pytest.approx(expected, rel=1e-6, abs=1e-9)
