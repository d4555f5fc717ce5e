"""Statistics are chi-square tests on fixed seeds. Each fails by chance, for freshly drawn seeds, once in 1e9 runs."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from amphista.accept import sampling
from amphista.accept.sampling import Chooser, Sampling, filtered_log_probs, gumbel_argmax, gumbel_noise
from amphista.errors import RequestError, TargetError
from amphista.native import build
from tests.oracle.decode import choose_plainly

FALSE_ALARM = 1e-9


def chi_square_tail(statistic, degrees):
    """P(chi-square > statistic), in closed form for an even number of degrees of freedom."""
    assert degrees % 2 == 0
    half = statistic / 2
    log_terms = [i * math.log(half) - math.lgamma(i + 1) - half for i in range(degrees // 2)]
    return math.fsum(math.exp(term) for term in log_terms)


def assert_fits(counts, probs):
    counts, expected = np.asarray(counts, dtype=float), np.asarray(probs) * np.sum(counts)
    assert expected.min() > 5
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square_tail(statistic, counts.size - 1) > FALSE_ALARM, f"chi-square {statistic:.1f}, {counts.size} bins"


def uniforms(seed, position, vocab_size):
    return np.exp(-np.exp(-gumbel_noise(seed, position, vocab_size)))


def assert_uniform(values, num_bins=101):
    assert_fits(np.histogram(values, bins=num_bins, range=(0, 1))[0], np.full(num_bins, 1 / num_bins))


def assert_independent(first, second, num_bins=5):
    """Independent and uniform: every cell of the square is equally likely."""
    counts = np.histogram2d(first, second, bins=num_bins, range=[(0, 1), (0, 1)])[0].ravel()
    assert_fits(counts, np.full(num_bins**2, 1 / num_bins**2))


def test_the_test_itself_would_notice():
    """One token in twenty taken from its neighbour is found."""
    source = np.random.default_rng(1)
    first = source.random(20_000)
    second = np.where(source.random(20_000) < 0.05, first, source.random(20_000))
    with pytest.raises(AssertionError):
        assert_independent(first, second)
    with pytest.raises(AssertionError):
        assert_uniform(source.random(20_000) ** 1.2)


# -- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 2**64 - 1, 2**12 - 1])
def test_uniforms_stay_inside_the_open_interval(monkeypatch, bits):
    class Fixed:
        def __init__(self, **_):
            pass

        def random_raw(self, size):
            return np.full(size, bits, dtype=np.uint64)

    monkeypatch.setattr(np.random, "Philox", Fixed)
    assert np.isfinite(gumbel_noise(0, 0, 3)).all()


def test_noise_is_uniform_over_tokens():
    for seed, position in [(0, 0), (1, 0), (0, 1), (2**64 - 1, 4095)]:
        assert_uniform(uniforms(seed, position, 50_000))


def test_noise_is_uniform_over_positions_and_over_seeds():
    by_position = np.stack([uniforms(3, position, 2) for position in range(12_000)])
    by_seed = np.stack([uniforms(seed, 3, 2) for seed in range(12_000)])
    for values in (by_position, by_seed):
        assert_uniform(values[:, 0])
        assert_uniform(values[:, 1])


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, -1), (1, 1), (2, -1)])
def test_neighbours_in_seed_and_position_are_independent(step):
    """(seed + position) as the key would give (s, p) and (s + 1, p - 1) the same stream."""
    there = [gumbel_noise(11 + step[0], 20 + step[1], 30_000), gumbel_noise(11, 20, 30_000)]
    assert_independent(np.exp(-np.exp(-there[0])), np.exp(-np.exp(-there[1])))
    near = [uniforms(s + step[0], p + step[1], 1)[0] for s in range(60) for p in range(10, 70)]
    here = [uniforms(s, p, 1)[0] for s in range(60) for p in range(10, 70)]
    assert_independent(near, here)


def test_tokens_are_independent():
    noise = uniforms(5, 6, 60_000)
    for distance in (1, 2, 4, 8):
        assert_independent(noise[:-distance], noise[distance:])


def test_streams_share_no_value():
    """Not even shifted: 52-bit values of two streams of 4000 meet by chance once in 2e8 runs."""
    streams = [
        set(gumbel_noise(s, p, 4000)) for s, p in [(7, 9), (8, 8), (8, 9), (7, 10), (6, 10), (9, 7), (16, 0), (0, 16)]
    ]
    assert len(set().union(*streams)) == sum(map(len, streams)) == 8 * 4000


def test_noise_belongs_to_the_token_id_whatever_the_vocabulary_size():
    assert np.array_equal(gumbel_noise(1, 2, 1000)[:7], gumbel_noise(1, 2, 7))


def test_noise_is_the_same_forever():
    """A seed is a promise across releases: same seed, same text."""
    pinned = [2.4425688622061, 0.531326899936919, 1.41301725667966, -1.12980197090632]
    np.testing.assert_allclose(gumbel_noise(2**63 + 5, 1234, 4), pinned, rtol=1e-12)


# -- filters ----------------------------------------------------------------------------------------------------------


def alive_plainly(logits, sampling):
    """The tokens that survive, by lists and loops: top-k, then top-p, then min-p."""
    scores = [value / sampling.temperature for value in logits]
    best = max(scores)
    alive = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if sampling.top_k:
        limit = scores[alive[min(sampling.top_k, len(alive)) - 1]]
        alive = [token for token in alive if scores[token] >= limit]
    if sampling.top_p < 1:
        total, mass, kept = math.fsum(math.exp(scores[t] - best) for t in alive), 0.0, []
        for token in alive:
            if mass < sampling.top_p * total:
                kept.append(token)
            mass += math.exp(scores[token] - best)
        alive = kept
    return {token for token in alive if math.exp(scores[token] - best) >= sampling.min_p}


@pytest.mark.parametrize("case", range(120))
def test_filters_equal_the_slow_reference(case):
    source = random.Random(case)
    logits = [source.gauss(0, 3) for _ in range(source.randrange(2, 40))]
    sampling = Sampling(
        temperature=source.choice([0.3, 0.7, 1.0, 1.7]),
        top_k=source.choice([0, 1, 2, 7, 100]),
        top_p=source.choice([1.0, 0.95, 0.5, 0.1, 1e-6]),
        min_p=source.choice([0.0, 0.01, 0.2, 0.9]),
    )
    found = filtered_log_probs(np.array(logits), sampling)
    alive = alive_plainly(logits, sampling)
    assert set(np.flatnonzero(np.isfinite(found)).tolist()) == alive
    for token in alive:
        assert found[token] == logits[token] / sampling.temperature


def test_ties():
    """All tokens at the top-k limit stay; top-p takes ties in the order of their ids."""
    logits = np.array([1.0, 2.0, 1.0, 1.0])
    kept = filtered_log_probs(logits, Sampling(temperature=1.0, top_k=2))
    assert np.isfinite(kept).all()
    kept = filtered_log_probs(np.zeros(4), Sampling(temperature=1.0, top_p=0.5))
    assert np.isfinite(kept).tolist() == [True, True, False, False]


def test_the_best_token_always_survives():
    logits = np.array([0.0, 5.0, 1.0])
    sampling = Sampling(temperature=0.01, top_k=1, top_p=1e-12, min_p=1.0)
    assert np.isfinite(filtered_log_probs(logits, sampling)).tolist() == [False, True, False]


def test_filters_leave_the_logits_alone():
    logits = np.array([0.0, 5.0, 1.0])
    filtered_log_probs(logits, Sampling(temperature=1.0, top_k=1, top_p=0.5))
    assert logits.tolist() == [0.0, 5.0, 1.0]


# -- the choice -------------------------------------------------------------------------------------------------------


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
    assert chooser._scores(logits, 0, [0]).tolist() == [2.0, -8.0, 3.0, 1.0]
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


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -2},
        {"min_tokens": -1},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {1: math.inf}},
        {"logit_bias": 3},
        {"suppress_tokens": [1.5]},
        {"suppress_tokens": [-1]},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_settings_at_the_edge_are_taken():
    Sampling(temperature=0.0, top_p=1.0, min_p=1.0, seed=2**64 - 1)
    assert Sampling().is_greedy and not Sampling(temperature=1e-9).is_greedy


@pytest.mark.parametrize("is_loaded", [True, False])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0, 30.0])
def test_gumbel_argmax_is_the_argmax_with_all_noise(spread, is_loaded, monkeypatch):
    """Flat scores, where any token may win, to steep ones; filtered tokens never win. In C and without it."""
    build.load()
    if not is_loaded:
        monkeypatch.setattr(sampling, "may_win", lambda *_: None)
    winners = set()
    for trial in range(60):
        scores = np.random.default_rng(trial).normal(size=3000) * spread
        scores[trial::7] = -np.inf
        noise = gumbel_noise(trial, 5, 3000)
        expected = int((scores + noise).argmax())
        assert gumbel_argmax(scores, trial, 5) == expected
        for temperature in (1e-30, 0.3, 1.7, 1e30):  # of float32, as logits come
            rounded = scores.astype(np.float32)
            drawn = int(((rounded.astype(np.float64) - rounded.max()) / temperature + noise).argmax())
            assert gumbel_argmax(rounded, trial, 5, temperature) == drawn
            assert gumbel_argmax(np.repeat(rounded, 2)[::2], trial, 5, temperature) == drawn
        few = np.where(np.arange(3000) % 17 == trial % 17, scores, -np.inf)
        assert gumbel_argmax(few, trial, 5) == int((few + noise).argmax())
        winners.add(expected == int(scores.argmax()))
    assert winners == {True, False} or spread in (0.0, 30.0)


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
        assert torch.equal(Chooser(Sampling(repetition_penalty=penalty), ids)._scores(logits, 4, []), theirs)


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
