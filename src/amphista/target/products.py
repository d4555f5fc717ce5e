"""Linear layers whose weights the C step reads: as they lie, in huge pages, or rounded to 8 bits.

Weights of 8 bits are a quarter of the bytes to read, and products of whole numbers. Where the processor is quick at
these, 32 inputs of an output share a scale, and so do those of a *row* (packed.h). Elsewhere an output's weights have
one scale and a row has one, which errs many times as much. Scales come from that row alone: a row's result is the same,
bit for bit, whatever rows it is computed with. What it costs is accuracy of the target itself, which is no longer the
float32 one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from amphista.errors import NativeError
from amphista.kernels.linear import Product, TorchLinear
from amphista.native.huge_pages import Arena
from amphista.native.weights import Weight

ARENA = Arena()


class PlainLinear(TorchLinear):
    """y = x W^T + b, the weight copied as it lies into huge pages: the torch form and the C step both read it."""

    is_copy = True

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(ARENA.copy(weight), bias)

    @property
    def native(self) -> Weight:
        """As the C step reads it."""
        return Weight.of(self.weight, self.bias)

    def halves(self) -> list[Weight]:
        """Of two layers of one size side by side, each."""
        biases = [None, None] if self.bias is None else self.bias.chunk(2)
        return [Weight.of(part, bias) for part, bias in zip(self.weight.chunk(2), biases, strict=True)]


class NativeLinear(Product):
    """y = x W^T + b for float32 rows x [N, I], multiplied in C only; gate and up, which the C step multiplies one by
    one, stay two weights."""

    has_8_bits = False  # whether rows are rounded to 8 bits
    parts: list[Weight]

    @property
    def arithmetic(self) -> str:
        """What two targets of the same weights must share for the same numbers."""
        return "float32"

    @property
    def is_packed(self) -> bool:
        """Whether whole numbers multiply it, or a part of it."""
        return any(part.is_packed for part in self.parts)

    def _take(self, parts: Sequence[Weight]) -> None:
        self.parts = list(parts)
        self.num_outputs, self.num_inputs = sum(part.num_outputs for part in parts), parts[0].num_inputs

    @property
    def native(self) -> Weight:
        (weight,) = self.parts
        return weight

    def halves(self) -> list[Weight]:
        assert len(self.parts) == 2
        return self.parts

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.cat([part.multiply(rows) for part in self.parts], dim=1)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


class RoundedLinear(NativeLinear):
    """Weights of 8 bits."""

    is_copy = has_8_bits = True

    @property
    def arithmetic(self) -> str:
        return "rounded-int8" if self.is_packed else "int8"

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._take([_rounded(weight, bias)])

    @classmethod
    def side_by_side(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Self:
        if len(weights) != 2:
            return super().side_by_side(weights, biases)
        made = cls.__new__(cls)
        made._take([_rounded(w, b) for w, b in zip(weights, biases, strict=True)])
        return made


def _rounded(weight: Tensor, bias: Tensor | None) -> Weight:
    """In blocks where whole numbers are quick at these and blocks can hold it, else with one scale an output."""
    try:
        if Weight.in_8_bit_blocks(weight[:1]).packed_size():  # one row tells
            return Weight.in_8_bit_blocks(weight, bias).packed(ARENA, is_coarse=True)
    except NativeError:
        pass
    return Weight.of_8_bits(weight, bias, ARENA)


def native_weight(product: Product) -> Weight:
    """The weight of a product that the C step reads."""
    return _read(product).native


def native_halves(product: Product) -> list[Weight]:
    """Those of two layers side by side."""
    return _read(product).halves()


def _read(product: Product) -> PlainLinear | NativeLinear:
    assert isinstance(product, PlainLinear | NativeLinear)
    return product
