"""Keyed noise is the same whoever works out its bits."""

from __future__ import annotations

import numpy as np
import pytest

from amphista.accept.sampling import gumbel_argmax, gumbel_noise
from amphista.native import build, noise


@pytest.mark.parametrize("is_loaded", [True, False])
@pytest.mark.parametrize("seed", [0, 7, 2**53 - 1, 2**64 - 1])
def test_bits_are_numpys(seed, is_loaded, monkeypatch):
    build.load()
    if not is_loaded:
        monkeypatch.setattr(noise, "_in_c", lambda *_: False)
    for position, count in ((0, 1), (2**40, 4098), (5, 4), (3, 0)):
        expected = np.random.Philox(key=seed, counter=[0, position, 0, 0]).random_raw(count)
        found = noise.first_bits(seed, position, count)
        assert np.array_equal(found, expected) and found.dtype == np.uint64
        places = [place for place in (0, 3, 4097, 2, 64, 64) if place < count]
        assert np.array_equal(noise.bits_at(seed, position, places), expected[places])


def test_the_library_is_asked():
    """Its own answer, not numpy's."""
    build.load()
    assert noise._in_c(3, 4, None, np.empty(5, dtype=np.uint64))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_few_may_win_and_the_winner_is_among_them(spread, temperature):
    """Whatever threads take which part; scores as those of a vocabulary whose end is no whole block."""
    build.load()
    size, most = 49_151, 0
    for seed in range(20):
        scores = (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)
        told = noise.may_win(seed, 9, scores, int(scores.argmax()), temperature)
        assert told is not None
        tokens, bits = told
        assert np.array_equal(bits, noise.bits_at(seed, 9, tokens)) and (np.diff(tokens) > 0).all()
        assert int((scores.astype(np.float64) / temperature + gumbel_noise(seed, 9, size)).argmax()) in tokens
        most = max(most, len(tokens))
    assert most < 200


def test_more_than_can_be_told_are_not_told(monkeypatch):
    build.load()
    scores = np.zeros(5000, dtype=np.float32)
    expected = int(gumbel_noise(3, 4, 5000).argmax())
    monkeypatch.setattr(noise, "MOST_TOLD", 1)
    assert noise.may_win(3, 4, scores, 0, 1.0) is None and gumbel_argmax(scores, 3, 4) == expected
