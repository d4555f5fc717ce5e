"""Keyed noise is the same whoever works out its bits."""

from __future__ import annotations

import numpy as np
import pytest

from amphista.native import build, noise


def plainly(seed, position, token):
    """Of numpy's generator: 16 bits of one stream, 48 of another."""
    first, other = (np.random.Philox(key=seed, counter=[0, position, stream, 0]) for stream in (0, 1))
    word = int(first.random_raw(token // 4 + 1)[-1])
    return (word >> 16 * (token % 4) & 0xFFFF) << 48 | int(other.random_raw(token + 1)[-1]) >> 16


@pytest.mark.parametrize("is_loaded", [True, False])
@pytest.mark.parametrize("seed", [0, 7, 2**53 - 1, 2**64 - 1])
def test_bits_are_numpys(seed, is_loaded, monkeypatch):
    build.load()
    if not is_loaded:
        monkeypatch.setattr(noise, "_in_c", lambda *_: False)
    tokens = [0, 3, 4097, 2, 64, 64, 17, 15]
    for position in (0, 3, 2**40):
        expected = [plainly(seed, position, token) for token in tokens]
        assert noise.bits_of(seed, [position] * len(tokens), tokens).tolist() == expected
        assert noise.first_bits(seed, position, 4098)[tokens].tolist() == expected
        along = range(position, position + len(tokens))
        expected = [plainly(seed, at, token) for at, token in zip(along, tokens, strict=True)]
        assert noise.bits_of(seed, along, tokens).tolist() == expected
        assert noise.bits_of(seed, [], []).size == noise.first_bits(seed, position, 0).size == 0


def test_the_library_is_asked():
    """Its own answer, not numpy's."""
    build.load()
    words = np.empty(2, dtype=np.uint64)
    assert noise._in_c(3, words * 0, np.array([1, 2]), words)
