"""Parts of a transformer layer that the fast forms of target and drafter share: norm, rotary table, rotation by pairs.

The two numbers of a head that are rotated together are stored side by side, so that rotating is one product of complex
numbers (arXiv 2104.09864): `paired` puts the rows of a weight, or of a norm over heads, in that order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amphista.native import training as native

FIRST_POSITIONS = 1024
ABOUT_ONE = {"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"}  # norms that hold by how much a weight differs from 1


@dataclass(frozen=True)
class Norm:
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        """That of a norm module, ours or the target's."""
        weight = module.weight.detach()
        if type(module).__name__ in ABOUT_ONE:
            weight = 1.0 + weight.to(torch.promote_types(weight.dtype, torch.float32))
        return cls(weight, module.eps if hasattr(module, "eps") else module.variance_epsilon)

    @cached_property
    def _wide(self) -> Tensor:
        return self.weight.float()

    def __call__(self, rows: Tensor) -> Tensor:
        if native.passes(rows, rows.shape[-1]):  # torch takes five passes
            return native.norm(rows.view(-1, rows.shape[-1]), self._wide, self.eps)[0].view_as(rows)
        if rows.dtype is not self.weight.dtype:
            return torch.rms_norm(rows.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(rows.dtype)
        return torch.rms_norm(rows, self.weight.shape, self.weight, self.eps)


def attention_of_any_shape(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """torch's attention by kernels that take any shape at once. On a Hopper GPU torch prefers cuDNN, which makes a plan
    for each shape it meets first: 50 ms and more, for every new length of a prompt (seen on an H200)."""
    if not query.is_cuda:
        return functional.scaled_dot_product_attention(query, key, value, **how)
    backends: Any = torch.backends.cuda
    was_enabled = backends.cudnn_sdp_enabled()
    backends.enable_cudnn_sdp(False)
    try:
        return functional.scaled_dot_product_attention(query, key, value, **how)
    finally:
        backends.enable_cudnn_sdp(was_enabled)


class RotaryTable:
    """Rotary positions (arXiv 2104.09864) as complex numbers [P, ..., E / 2], for all positions asked for so far.

    Threads share it, so it only grows; what it has outgrown is kept, for recorded forwards read that very table.
    """

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        """make: the numbers of so many positions, from 0 on."""
        self._make, self._lock = make, threading.Lock()
        self.table = torch.empty(0)
        self._outgrown: list[Tensor] = []

    def reserve(self, num_positions: int) -> Tensor:
        """The table, with at least the positions 0..num_positions-1."""
        if num_positions > len(self.table):
            with self._lock:
                if num_positions > len(self.table):
                    self._outgrown.append(self.table)
                    self.table = self._make(max(FIRST_POSITIONS, 2 * num_positions))
        return self.table


def paired(rows: Tensor, head_size: int, num: int | None = None) -> Tensor:
    """Rows [heads * E, ...], of which i and i + N / 2 of a head are rotated together: these two side by side.

    num: N, a head's first; None: all; 0: as they lie.
    """
    if num == 0:
        return rows.detach()
    num = head_size if num is None else num
    first, rest = rows.detach().view(-1, head_size, *rows.shape[1:]).split([num, head_size - num], dim=1)
    halves = first.unflatten(1, (2, num // 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([halves, rest], dim=1).view(rows.shape)


@dataclass(frozen=True)
class Gate:
    """What a gate makes of an MLP's inner states: silu(gate) up (arXiv 2002.05202), or gelu(gate) up.

    slope: of silu's sigmoid. limit: what gates stay below, and ups, in size, too, to which 1 is added then; 0: nothing.
    """

    by_gelu: bool = False
    slope: float = 1.0
    limit: float = 0.0

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows [gate ; up] [N, 2 I] -> [N, I]."""
        is_plain = self == Gate()
        if is_plain and native.passes(rows, rows.shape[-1] // 2):
            return native.gated(rows)
        gate, up = rows.chunk(2, dim=-1)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit) + 1.0
        if self.by_gelu:
            return functional.gelu(gate, approximate="tanh") * up
        return (functional.silu(gate) if is_plain else gate * torch.sigmoid(self.slope * gate)) * up
