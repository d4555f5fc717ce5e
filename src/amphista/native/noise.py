"""Keyed noise and the choice by it, in C (noise.c) where the library is loaded already."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from amphista.native import build
from amphista.native.crew import CREW

Words = NDArray[np.uint64]
Integers = NDArray[np.integer[Any]]
GROUP, ROOM_PER_TOKEN = 64, 12  # of noise.c
BROKEN, NOTHING = -1, -2  # in place of a token: scores are no numbers; all are -inf
FAR = 1e30  # temperatures beyond, either way, are left to numpy
DRAWING = np.dtype(
    [
        *((name, np.uint64) for name in ("scores", "seed", "position")),
        *((name, np.float64) for name in ("temperature", "top_p", "min_p")),
        ("top_k", np.int64),
    ]
)


class Drawing(NamedTuple):
    """A row of scores [V], float32 and contiguous, by its address; at which position of which seed's noise; how."""

    scores: int
    seed: int
    position: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int


class _Room(threading.local):
    """A thread's own: to touch memory for the first time takes longer than to fill it."""

    bytes: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)


_room = _Room()


def bits_of(seed: int, positions: Sequence[int] | Integers, tokens: Sequence[int] | Integers) -> Words:
    """The words of some tokens, each at a position of its own."""
    at, ids = np.array(positions, dtype=np.uint64), np.array(tokens, dtype=np.int64)
    bits = np.empty(ids.size, dtype=np.uint64)
    if not _in_c(seed, at, ids, bits):
        for position in np.unique(at):
            here = at == position
            bits[here] = first_bits(seed, int(position), 1 + int(ids[here].max()))[ids[here]]
    return bits


def first_bits(seed: int, position: int, count: int) -> Words:
    """The words [count] of the first tokens at a position: of each 16 bits of one stream, then 48 of another."""
    streams = [np.random.Philox(key=seed, counter=[0, position, stream, 0]) for stream in (0, 1)]
    first = streams[0].random_raw(-(-count // 4)).astype("<u8").view("<u2")[:count].astype(np.uint64)
    return first << np.uint64(48) | streams[1].random_raw(count) >> np.uint64(16)


def draw(drawings: Sequence[Drawing], count: int) -> list[int] | None:
    """Of each row the token [of count] with the largest score / temperature + noise of those its filters leave.

    BROKEN or NOTHING where there is none; None where there is no library, or a row cannot be drawn of here.
    """
    if not build.load.cache_info().currsize or not all(1 / FAR < drawing.temperature < FAR for drawing in drawings):
        return None
    threads = min(CREW.num_threads(), len(drawings))
    size = threads * (count * ROOM_PER_TOKEN + -(-count // GROUP) * 4)
    if _room.bytes.size < size:
        _room.bytes = np.empty(size, dtype=np.uint8)
    rows, tokens = np.array(drawings, dtype=DRAWING), np.empty(len(drawings), dtype=np.int64)
    is_done = build.load().amphista_draw(
        *(ctypes.c_void_p(rows.ctypes.data), ctypes.c_int64(rows.size), ctypes.c_int64(count)),
        *(ctypes.c_void_p(_room.bytes.ctypes.data), ctypes.c_void_p(tokens.ctypes.data), ctypes.c_int(threads)),
    )
    return tokens.tolist() if is_done else None


def _in_c(seed: int, positions: Words, tokens: NDArray[np.int64], bits: Words) -> bool:
    """Whether the library has filled in the words."""
    if not build.load.cache_info().currsize:
        return False
    rows = [ctypes.c_void_p(row.ctypes.data) for row in (positions, tokens, bits)]
    return bool(build.load().amphista_noise_bits(ctypes.c_uint64(seed), ctypes.c_int64(tokens.size), *rows))
