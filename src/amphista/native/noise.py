"""Random bits by position, for keyed noise: numpy's, in C where the library is loaded already."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from amphista.native import build

Words = NDArray[np.uint64]
MOST_TOLD = 1024


class _Room(threading.local):
    """A thread's own: to touch memory for the first time takes longer than to fill it."""

    words: Words = np.empty(0, dtype=np.uint64)


_room = _Room()


def first_bits(seed: int, position: int, count: int) -> Words:
    """The first words [count] of a Philox generator whose key is `seed` and whose counter begins at `position`; valid
    until the thread asks for others."""
    if _room.words.size < count:
        _room.words = np.empty(count, dtype=np.uint64)
    bits = _room.words[:count]
    return bits if _in_c(seed, position, None, bits) else _first(seed, position, count)


def may_win(
    seed: int, position: int, scores: NDArray[np.float32], best: int, temperature: float
) -> tuple[NDArray[np.int64], Words] | None:
    """Tokens, ascending, among which is that with the largest score / temperature + noise, with their words of
    `first_bits`; None where they are many, or there is no library. best: that of the best score, which is finite."""
    if not build.load.cache_info().currsize:
        return None
    tokens, bits = np.empty(MOST_TOLD, dtype=np.int64), np.empty(MOST_TOLD, dtype=np.uint64)
    scores, threads = np.ascontiguousarray(scores), torch.get_num_threads()
    number = build.load().amphista_may_win(
        *(ctypes.c_uint64(seed), ctypes.c_uint64(position), ctypes.c_void_p(scores.ctypes.data)),
        *(ctypes.c_int64(scores.size), ctypes.c_int64(best), ctypes.c_double(temperature), ctypes.c_int64(MOST_TOLD)),
        *(ctypes.c_void_p(tokens.ctypes.data), ctypes.c_void_p(bits.ctypes.data), ctypes.c_int(threads)),
    )
    if not 0 < number <= MOST_TOLD:
        return None
    order = tokens[:number].argsort()
    return tokens[order], bits[order]


def bits_at(seed: int, position: int, places: Sequence[int] | NDArray[np.integer[Any]]) -> Words:
    """Words of the same generator, by their places."""
    ids = np.array(places, dtype=np.int64)
    bits = np.empty(ids.size, dtype=np.uint64)
    if _in_c(seed, position, ids, bits):
        return bits
    return _first(seed, position, 1 << int(ids.max(initial=0)).bit_length())[ids]


def bits_along(seed: int, position: int, places: Sequence[int]) -> Words:
    """Of each of successive positions the word of one place."""
    ids = np.array(places, dtype=np.int64)
    bits = np.empty(ids.size, dtype=np.uint64)
    if _in_c(seed, position, ids, bits, is_along=True):
        return bits
    return np.array([bits_at(seed, at, [place])[0] for at, place in enumerate(places, position)], dtype=np.uint64)


def _in_c(seed: int, position: int, places: NDArray[np.int64] | None, bits: Words, *, is_along: bool = False) -> bool:
    """Whether the library has filled in the words."""
    if not build.load.cache_info().currsize:
        return False
    words = ctypes.c_uint64(seed), ctypes.c_uint64(position)
    rows = (None if places is None else ctypes.c_void_p(places.ctypes.data)), ctypes.c_int64(bits.size)
    library = build.load()
    fill = library.amphista_bits_along if is_along else library.amphista_random_bits
    return bool(fill(*words, *rows, ctypes.c_void_p(bits.ctypes.data)))


@lru_cache(maxsize=32)  # of a position that is drafted for they are wanted several times
def _first(seed: int, position: int, count: int) -> Words:
    return np.random.Philox(key=seed, counter=[0, position, 0, 0]).random_raw(count)
