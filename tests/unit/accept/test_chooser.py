"""The target's choice. Statistics are chi-square tests on fixed seeds."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from amphista.accept.chooser import Chooser, on_host
from amphista.accept.draw import gumbel_noise
from amphista.accept.sampling import Sampling
from amphista.errors import RequestError, TargetError
from tests.oracle.decode import choose_plainly
from tests.unit.accept.chi_square import assert_fits


def test_choices_have_exactly_the_targets_distribution():
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.7])
    probs = torch.softmax(logits.double() / 0.8, 0).numpy()
    by_position = Chooser(Sampling(temperature=0.8, seed=4), [])
    counts = np.bincount([by_position.choose(logits, position) for position in range(20_000)], minlength=5)
    assert_fits(counts, probs)
    by_seed = [Chooser(Sampling(temperature=0.8, seed=seed), []).choose(logits, 9) for seed in range(20_000)]
    assert_fits(np.bincount(by_seed, minlength=5), probs)


def test_filtered_choices_have_the_renormalised_distribution():
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.7])
    chooser = Chooser(Sampling(temperature=1.0, top_k=3, seed=4), [])
    counts = np.bincount([chooser.choose(logits, position) for position in range(20_000)], minlength=5)
    assert counts[1] == counts[3] == 0
    assert_fits(counts[[0, 2, 4]], torch.softmax(logits[[0, 2, 4]].double(), 0).numpy())


@pytest.mark.parametrize("case", range(40))
def test_choices_equal_the_slow_reference(case):
    source = random.Random(case)
    logits = torch.tensor([source.gauss(0, 2) for _ in range(50)], dtype=torch.float64)
    ids = [source.randrange(50) for _ in range(source.randrange(1, 30))]
    sampling = Sampling(
        temperature=source.choice([0.0, 0.7, 1.3]),
        top_p=source.choice([1.0, 0.8]),
        repetition_penalty=source.choice([1.0, 0.8, 1.6]),
        frequency_penalty=source.choice([0.0, 0.0, 1.5, -0.5]),
        presence_penalty=source.choice([0.0, 0.0, 2.0]),
        logit_bias=source.choice([{}, {3: 4.0, 40: -2.0}]),
        suppress_tokens=source.choice([(), (1, 2, 30)]),
        min_tokens=source.choice([0, 12]),
        seed=source.randrange(2**64),
    )
    cut = source.randrange(len(ids) + 1)
    chooser = Chooser(sampling, ids[: cut // 2], [4, 5])
    chooser.extend(ids[cut // 2 : cut])
    expected = choose_plainly(logits.tolist(), ids, sampling, cut // 2, [4, 5])
    assert chooser.choose(logits, len(ids), ids[cut:]) == expected


def test_penalty_divides_positive_and_multiplies_negative_logits_once():
    logits = torch.tensor([4.0, -4.0, 3.0, 1.0])
    chooser = Chooser(Sampling(repetition_penalty=2.0), [0, 0, 1])
    assert chooser.scores(logits.numpy(), 0, [0]).tolist() == [2.0, -8.0, 3.0, 1.0]
    assert chooser.choose(logits, 0) == 2
    assert chooser.choose(logits, 0, [2]) == 0, "tokens on the path count as if they were output"
    assert chooser.choose(logits, 0) == 2, "and only on that path"
    chooser.extend([2])
    assert chooser.choose(logits, 0) == 0
    assert logits.tolist() == [4.0, -4.0, 3.0, 1.0]
    assert Chooser(Sampling(repetition_penalty=2.0), []).choose(logits, 0) == 0


def test_margin_is_the_gap_of_the_two_best_scores():
    logits = torch.tensor([1.0, 4.0, 3.25])
    assert Chooser(Sampling(), []).margin(logits, 0) == 0.75
    noised = np.sort(logits.double().numpy() / 0.5 + gumbel_noise(3, 8, 3))
    assert Chooser(Sampling(temperature=0.5, seed=3), []).margin(logits, 8) == pytest.approx(noised[-1] - noised[-2])


def test_penalties_are_taken_in_float32_whatever_the_logits_type():
    """7 / 1.3 is 5.385 in float32, above 5.375; rounded to bfloat16 it would be 5.375 and tie."""
    logits = torch.full((20,), -4.0)
    logits[12], logits[3] = 7.0, 5.375
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert Chooser(Sampling(repetition_penalty=1.3), [12]).choose(logits.to(dtype), 1) == 12
    assert Chooser(Sampling(presence_penalty=1.63), []).choose(logits.bfloat16(), 0) == 12
    chooser = Chooser(Sampling(presence_penalty=1.622), [])
    chooser.extend([12])
    assert chooser.choose(logits.bfloat16(), 1) == 12, "7 - 1.622 is above 5.375"


@pytest.mark.parametrize("penalty", [1.1, 1.7, 0.6])
def test_penalties_equal_those_of_transformers(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    ids = [3, 3, 8, 19]
    for trial in range(10):
        logits = (torch.randn(60, generator=torch.Generator().manual_seed(trial)) * 3).bfloat16()
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits.float()[None].clone())[0]
        ours = Chooser(Sampling(repetition_penalty=penalty), ids).scores(*on_host([logits]), 4)
        assert np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("temperature", [5e-309, 5e-324, 1e-300])
def test_a_temperature_next_to_nothing_is_greedy(temperature):
    for logits in ([1.0, 3.0, 2.5], [-1.0, -3.0, -2.5], [0.0, 1e-3, -5.0]):
        chooser = Chooser(Sampling(temperature=temperature, seed=1), [])
        assert all(chooser.choose(torch.tensor(logits), at) == max(range(3), key=logits.__getitem__) for at in range(9))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_said(temperature, broken):
    if temperature == 0 and broken == math.inf:
        broken = math.nan
    with pytest.raises(TargetError, match="no finite numbers"):
        Chooser(Sampling(temperature=temperature), []).choose(torch.tensor([1.0, broken, 2.0]), 0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nothing_left_to_choose_from_is_said(temperature):
    chooser = Chooser(Sampling(temperature=temperature, suppress_tokens=(0, 1)), [])
    with pytest.raises(RequestError, match="every token is suppressed"):
        chooser.choose(torch.tensor([1.0, 2.0]), 0)
