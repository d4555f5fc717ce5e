"""Keyed noise is the same whoever works out its bits."""

from __future__ import annotations

import numpy as np
import pytest

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
