"""The two operations of a step over slots that torch has no kernel for: attention over rows of unequal number, and the
choice of a token with keyed noise. In Triton on CUDA; elsewhere, and as what those are tested against, in torch.

Noise depends on (seed, position, token) alone, as everywhere here, but comes from a hash of 32 bits that a GPU computes
where it needs it: other noise than the Philox of `accept/sampling.py`, for answers that nobody asks for again by seed.

Shapes: B slots, R rows a slot has room for, H query heads, J key-value heads, G = H / J, E head size, V vocabulary.
"""

# Triton reads the annotations of its kernels: those without one are tensors and numbers.
# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch for CPUs comes without it
    triton = None

LOWEST = 1e-10  # of a uniform number: both logarithms stay finite
GROUP_ROWS = 16  # query heads of a group are padded to what a matrix unit takes
ROWS_AT_ONCE = 64
TOKENS_AT_ONCE = 4096


def attend(queries: Tensor, new: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], lengths: Tensor) -> Tensor:
    """Attention [B, H * E] of scaled queries [B, H, E] over each slot's first `lengths` [B] rows and its new one.

    new: keys and values [B, J, E], which are also written behind those rows. cached: the same [B, J, R, E].
    """
    if queries.is_cuda:
        return _attend_by_triton(queries, new, cached, lengths)
    slots, (keys, values) = torch.arange(len(lengths)), cached
    keys[slots, :, lengths], values[slots, :, lengths] = new
    hidden = torch.arange(keys.shape[2]) > lengths[:, None]
    grouped = queries.unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("bjge,bjre->bjgr", grouped, keys).masked_fill(hidden[:, None, None], -torch.inf)
    return torch.einsum("bjgr,bjre->bjge", torch.softmax(scores, -1), values).flatten(1)


def choose(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Token ids [B] of logits [B, V]: the best one at temperature 0, above it the best with Gumbel noise.

    temperatures [B] float32. seeds, positions: int64 [B]; the low 32 bits count.
    """
    keys = mixed(seeds ^ mixed(positions))
    if logits.is_cuda:
        return _choose_by_triton(logits, temperatures, keys)
    bits = mixed(keys[:, None] ^ mixed(torch.arange(logits.shape[1])))
    uniform = (bits.double() / 2**32).clamp_min(LOWEST)
    noise, heat = -torch.log(-torch.log(uniform)), temperatures[:, None]
    return torch.where(heat > 0, logits / heat.clamp_min(LOWEST) + noise, logits.double()).argmax(-1)


def mixed(bits: Tensor) -> Tensor:
    """A hash of the low 32 bits of int64 numbers, in the low 32 (lowbias32, by the search of "hash-prospector")."""
    low = 0xFFFFFFFF
    bits = bits & low
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & low
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & low
    return bits ^ (bits >> 16)


def _attend_by_triton(
    queries: Tensor, new: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], lengths: Tensor
) -> Tensor:
    slots, heads, size = queries.shape
    key_heads, rows = cached[0].shape[1:3]
    mixed_values = torch.empty(slots, heads * size, dtype=queries.dtype, device=queries.device)
    _attend[(slots, key_heads)](
        queries,
        *new,
        *cached,
        lengths,
        mixed_values,
        queries.stride(0),
        new[0].stride(0),
        new[1].stride(0),
        rows,
        key_heads,
        heads // key_heads,
        SIZE=size,
        GROUP=GROUP_ROWS,
        ROWS=ROWS_AT_ONCE,
    )
    return mixed_values


def _choose_by_triton(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _choose[(len(logits),)](logits, temperatures, keys, tokens, logits.shape[1], TOKENS=TOKENS_AT_ONCE, LOWEST=LOWEST)
    return tokens


def has_triton() -> bool:
    """Whether the kernels can run on CUDA."""
    return triton is not None


def jit(function: Any) -> Any:
    """A Triton kernel; the bare function where there is no Triton, which nobody calls."""
    return function if triton is None else triton.jit(function)


@jit
def _attend(
    queries, new_keys, new_values, keys, values, lengths, out,
    query_stride, key_stride, value_stride, num_rows, key_heads, groups,
    SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One slot and key-value head: its group's queries over its rows, a block at a time, with a running softmax."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + slot)
    at, group, block = tl.arange(0, SIZE), tl.arange(0, GROUP), tl.arange(0, ROWS)
    wanted = (group < groups)[:, None]
    places = (head * groups + group)[:, None] * SIZE + at[None, :]
    query = tl.load(queries + slot * query_stride + places, mask=wanted, other=0.0)
    key = tl.load(new_keys + slot * key_stride + head * SIZE + at)
    value = tl.load(new_values + slot * value_stride + head * SIZE + at)
    start = (slot * key_heads + head) * num_rows * SIZE
    tl.store(keys + start + length * SIZE + at, key)
    tl.store(values + start + length * SIZE + at, value)
    largest = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1)
    total = tl.full([GROUP], 1.0, tl.float32)
    mixed_rows = tl.zeros([GROUP, SIZE], tl.float32) + value.to(tl.float32)[None, :]
    for first in range(0, length, ROWS):
        row = first + block
        known = row < length
        here = start + row[:, None] * SIZE + at[None, :]
        some = tl.load(keys + here, mask=known[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(some), input_precision="ieee")
        scores = tl.where(known[None, :], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        weights, kept = tl.exp(scores - now[:, None]), tl.exp(largest - now)
        some = tl.load(values + here, mask=known[:, None], other=0.0)
        mixed_rows = mixed_rows * kept[:, None] + tl.dot(weights.to(some.dtype), some, input_precision="ieee")
        total = total * kept + tl.sum(weights, 1)
        largest = now
    tl.store(out + slot * (key_heads * groups * SIZE) + places, mixed_rows / total[:, None], mask=wanted)


@jit
def _hash(bits):
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@jit
def _choose(logits, temperatures, keys, tokens, vocab, TOKENS: tl.constexpr, LOWEST: tl.constexpr):
    """One slot: its best token, a block of the vocabulary at a time; the lowest id of equals."""
    slot = tl.program_id(0).to(tl.int64)
    heat, key = tl.load(temperatures + slot), tl.load(keys + slot).to(tl.uint32)
    best, chosen = float("-inf"), 0
    for first in range(0, vocab, TOKENS):
        token = first + tl.arange(0, TOKENS)
        scores = tl.load(logits + slot * vocab + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        if heat > 0:
            uniform = _hash(key ^ _hash(token.to(tl.uint32))).to(tl.float32) / 4294967296.0
            uniform = tl.minimum(tl.maximum(uniform, LOWEST), 0.99999994)
            scores = scores / heat - tl.log(-tl.log(uniform))
        highest = tl.max(scores, 0)
        chosen = tl.where(highest > best, first + tl.argmax(scores, 0), chosen)
        best = tl.maximum(highest, best)
    tl.store(tokens + slot, chosen)
