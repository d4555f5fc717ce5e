"""Noise, filters, and what is drawn by them."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from amphista.accept import draw
from amphista.accept.draw import Drawn, draw_all, filtered_log_probs, gumbel_argmax, gumbel_noise
from amphista.accept.sampling import Sampling
from amphista.errors import RequestError, TargetError
from amphista.native import build, noise
from tests.unit.accept.chi_square import assert_fits


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
    pinned = [0.674765863803709, -0.935555196050154, -0.747957222224484, 2.4427360484135]
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


# -- draws ------------------------------------------------------------------------------------------------------------

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 900},
    {"top_k": 2**63},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 1 - 1e-12},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 2000, "top_p": 0.97, "min_p": 1e-4},
    {"top_p": 0.99, "min_p": 0.2},
]


def drawn_plainly(row):
    """The argmax of filtered log-probabilities and all noise."""
    log_probs = filtered_log_probs(row.scores.astype(np.float64), row.sampling)
    return int((log_probs - log_probs.max() + gumbel_noise(row.seed, row.position, row.scores.size)).argmax())


def rows_of(spread, size, temperature, seed=0):
    """A row for each filter; some tokens cannot be, some are equal, all lie high or low."""
    source = np.random.default_rng(seed)
    for number, filters in enumerate(FILTERS):
        scores = (source.normal(size=size) * spread + (0, -300, 2000)[seed % 3]).astype(np.float32)
        scores[number::7] = -np.inf
        scores[: size // 2 : 3] = np.round(scores[: size // 2 : 3])
        scores[source.integers(size)] = np.max(scores, where=scores > -np.inf, initial=-400)
        yield Drawn(scores, Sampling(temperature=temperature, **filters), seed + number, 5 + number)


@pytest.mark.parametrize("is_loaded", [True, False])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 4.0])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0, 30.0])
def test_draws_are_those_of_all_noise(spread, temperature, is_loaded, monkeypatch):
    """Flat scores, where any token may win, to steep ones; filtered tokens never win. In C and without it, alone and
    together, of vocabularies that are no whole groups, or less than one."""
    build.load()
    if not is_loaded:
        monkeypatch.setattr(noise, "draw", lambda *_: None)
    sizes = (1, 2, 15, 17, 63, 64, 65, 300, 3001) if is_loaded else (1, 3001)
    for size in sizes:
        for seed in range(4):
            rows = list(rows_of(spread, size, temperature, seed))
            expected = [drawn_plainly(row) for row in rows]
            assert draw_all(rows) == expected
            assert [draw_all([row])[0] for row in rows] == expected


def test_no_token_more_than_top_p_needs():
    """Where some reach it exactly; of equals those of lower ids."""
    build.load()
    for size, top_p, kept in ((4, 0.5, 2), (200, 0.25, 50), (128, 0.75, 96), (3, 1e-9, 1)):
        sampling = Sampling(temperature=1.0, top_p=top_p)
        rows = [Drawn(np.zeros(size, dtype=np.float32), sampling, seed, 3) for seed in range(40 * size)]
        assert set(draw_all(rows)) == set(range(kept))


def test_large_vocabularies_are_drawn_of_alike():
    """Where top-k looks at the best of each group only, and more candidates of top-p than are sorted at once."""
    build.load()
    for temperature, spread in ((0.3, 1.0), (1.0, 1.0), (1.5, 3.0)):
        for seed in (0, 100):
            rows = list(rows_of(spread, 49_151, temperature, seed))
            assert draw_all(rows) == [drawn_plainly(row) for row in rows]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-29, 1e29, 1e300])
def test_any_temperature_is_drawn_at(temperature):
    build.load()
    with np.errstate(all="ignore"):
        for row in rows_of(2.0, 500, temperature):
            (token,) = draw_all([row])
            if temperature < 1:
                assert row.scores[token] == row.scores.max()
            elif not row.sampling.is_filtered:
                alive = np.where(row.scores > -np.inf, gumbel_noise(row.seed, row.position, 500), -np.inf)
                assert token == int(alive.argmax())


def test_the_library_is_asked(monkeypatch):
    """Its own answer, not numpy's; of rows that do not lie in one piece, too, and not of wider numbers."""
    build.load()
    rows, wide = list(rows_of(1.0, 300, 0.8)), list(rows_of(1.0, 300, 0.8))
    apart = [row._replace(scores=np.repeat(row.scores, 2)[::2]) for row in rows]
    expected = [drawn_plainly(row) for row in rows]
    monkeypatch.setattr(draw, "_draw", lambda _: -5)
    assert draw_all(rows) == draw_all(apart) == expected
    assert draw_all([row._replace(scores=row.scores.astype(np.float64)) for row in wide]) == [-5] * len(wide)


@pytest.mark.parametrize("filters", FILTERS)
def test_what_is_broken_is_said(filters):
    build.load()
    sampling = Sampling(temperature=0.8, **filters)
    good = Drawn(np.zeros(200, dtype=np.float32), sampling, 1, 1)
    for place in (0, 70, 199):
        for value, error in ((np.nan, TargetError), (np.inf, TargetError)):
            scores = good.scores.copy()
            scores[place] = value
            with pytest.raises(error, match="no finite numbers"):
                draw_all([good, good._replace(scores=scores)])
    with pytest.raises(RequestError, match="every token is suppressed"):
        draw_all([good, good._replace(scores=np.full(200, -np.inf, dtype=np.float32))])


def test_gumbel_argmax_is_the_argmax_with_all_noise():
    for trial in range(30):
        scores = np.random.default_rng(trial).normal(size=3000)
        few = np.where(np.arange(3000) % 17 == trial % 17, scores, -np.inf)
        for some in (scores, few):
            assert gumbel_argmax(some, trial, 5) == int((some + gumbel_noise(trial, 5, 3000)).argmax())
