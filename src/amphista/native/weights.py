"""Weights of linear layers as the C step reads them: float32, bfloat16, 8 bits, and the blocks of a GGUF file.

Shapes: O outputs, I inputs, N rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amphista.errors import NativeError
from amphista.native.build import load
from amphista.native.crew import CREW
from amphista.native.huge_pages import Arena

BLOCK, GROUP, LEVELS, ZERO = 32, 4, 127, 128  # of packed 8-bit weights: outputs side by side, inputs side by side
KINDS = {torch.float32: 0, torch.bfloat16: 1}
INT8, SIDE_BY_SIDE = 2, 3
FINE, COARSE = 32, 64  # added to the kind of blocks: packed, for rows of 16 bits or of 8
BLOCK_BYTES = 2, 18, 20, 22, 24, 34, 36, 144, 176, 210, 84, 110, 136  # of a GGUF file's kinds, in the order of blocks.h
BLOCK_KINDS = {size: 4 + place for place, size in enumerate(BLOCK_BYTES)}
BLOCK_NUMBERS = {2: 1, 36: 64} | dict.fromkeys((144, 176, 210, 84, 110, 136), 256)  # in a block; of all others 32
HALVES = 32  # float16 is read by so many
PAD = 64  # rows of our own are padded with zeros to a multiple
Address = ctypes.c_void_p


class ProductStruct(ctypes.Structure):
    """A weight as products.h has it."""

    _fields_ = [
        *((name, Address) for name in ("weight", "scales", "offsets", "bias")),
        *((name, ctypes.c_int32) for name in ("kind", "outputs", "inputs", "unused")),
    ]


@dataclass(frozen=True)
class Weight:
    """A linear layer's weight [O, I] as the C step reads it, and its bias [O].

    parts: of weights of several kinds, whose outputs follow each other; `weight` then holds their records.
    """

    num_outputs: int
    num_inputs: int
    kind: int
    weight: Tensor
    scales: Tensor | None = None
    offsets: Tensor | None = None
    bias: Tensor | None = None
    parts: tuple[Weight, ...] = ()

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Weight:
        """A weight of float32 or bfloat16 as it lies: nothing is copied if it is contiguous."""
        if weight.dtype not in KINDS:
            raise NativeError(f"the C step has no weights of {str(weight.dtype).removeprefix('torch.')}")
        bias = None if bias is None else bias.detach().float().contiguous()
        return cls(weight.shape[0], weight.shape[1], KINDS[weight.dtype], weight.detach().contiguous(), bias=bias)

    @classmethod
    def of_8_bits(cls, weight: Tensor, bias: Tensor | None = None, arena: Arena | None = None) -> Weight:
        """A float32 weight rounded to 8 bits, one scale an output: a packed copy, in the arena if there is one."""
        outputs, inputs = weight.shape
        plain = weight.detach()
        scales = plain.abs().amax(1).clamp_min(torch.finfo(plain.dtype).tiny) / LEVELS
        numbers = plain.new_zeros(rounded_up(outputs, BLOCK), rounded_up(inputs, GROUP), dtype=torch.int8)
        numbers[:outputs, :inputs] = (plain / scales[:, None]).round().to(torch.int8)
        offsets = numbers.sum(1, dtype=torch.int32) * -ZERO
        blocks = numbers.view(-1, BLOCK, numbers.shape[1] // GROUP, GROUP).transpose(1, 2)
        blocks = blocks.contiguous() if arena is None else arena.copy(blocks)
        bias = None if bias is None else bias.detach().float().clone()
        return cls(outputs, inputs, INT8, blocks, scales, offsets, bias)

    @classmethod
    def in_8_bit_blocks(cls, weight: Tensor, bias: Tensor | None = None) -> Weight:
        """A float32 weight [O, I] rounded to blocks of 8 bits (Q8_0): 32 numbers with one scale of 16 bits.

        raises NativeError for a number of inputs that blocks do not divide, and for weights beyond their scales.
        """
        if weight.shape[1] % HALVES:
            raise NativeError(f"blocks of {HALVES} do not divide {weight.shape[1]} inputs")
        blocks = weight.detach().unflatten(1, (-1, HALVES))
        scales = (blocks.abs().amax(-1, keepdim=True) / LEVELS).half()
        if not scales.isfinite().all():
            raise NativeError("weights are larger than the scales of blocks")
        numbers = (blocks / scales.float().clamp_min(torch.finfo(torch.float16).smallest_normal / 2**10)).round()
        numbers = numbers.clamp_(-LEVELS, LEVELS).to(torch.int8)
        return cls.of_blocks(torch.cat([scales.view(torch.uint8), numbers.view(torch.uint8)], dim=-1), bias)

    @classmethod
    def of_blocks(cls, blocks: Tensor, bias: Tensor | None = None) -> Weight:
        """Blocks of a GGUF file, uint8 [O, blocks in a row, bytes of a block], or float32 [O, I]: as they lie.

        raises NativeError for blocks of a size that no known kind has.
        """
        if blocks.dtype is torch.float32:
            return cls.of(blocks, bias)
        outputs, count, size = blocks.shape
        inputs = count * BLOCK_NUMBERS.get(size, 32)
        if blocks.dtype is not torch.uint8 or size not in BLOCK_KINDS or inputs % HALVES:
            raise NativeError(f"the C step has no weights in blocks of {size} bytes, {inputs} numbers a row")
        bias = None if bias is None else bias.detach().float().clone()
        return cls(outputs, inputs, BLOCK_KINDS[size], blocks.contiguous(), bias=bias)

    def packed_size(self, flags: tuple[str, ...] | None = None) -> int:
        """Bytes of its blocks as products of whole numbers read them; 0 where that is not quicker."""
        size = load(flags).amphista_packed_size
        size.restype = ctypes.c_int64
        return int(size(self.kind, ctypes.c_int64(self.num_outputs), ctypes.c_int64(self.num_inputs)))

    def packed(
        self, arena: Arena | None = None, flags: tuple[str, ...] | None = None, *, is_coarse: bool = False
    ) -> Weight:
        """Blocks as products of whole numbers read them, a copy (packed.h); itself where that is not quicker.

        is_coarse: for rows of 8 bits, not of 16.
        """
        library, size = load(flags), self.packed_size(flags)
        if not size:
            return self
        place = torch.empty(size, dtype=torch.uint8) if arena is None else arena.empty(size)
        library.amphista_pack(ctypes.byref(self.record()), Address(place.data_ptr()), torch.get_num_threads())
        return replace(self, kind=self.kind + (COARSE if is_coarse else FINE), weight=place)

    @classmethod
    def side_by_side(cls, parts: Sequence[Weight]) -> Weight:
        """Weights of the same inputs whose outputs follow each other, of float32 or blocks."""
        records = (ProductStruct * len(parts))(*(part.record() for part in parts))
        weight = torch.frombuffer(bytearray(records), dtype=torch.uint8)
        outputs = sum(part.num_outputs for part in parts)
        return cls(outputs, parts[0].num_inputs, SIDE_BY_SIDE, weight, parts=tuple(parts))

    @property
    def is_packed(self) -> bool:
        """Whether whole numbers multiply it, or a part of it."""
        return self.kind >= FINE or any(part.is_packed for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Bytes a product reads."""
        if self.parts:
            return sum(part.num_bytes for part in self.parts)
        parts = [t for t in (self.weight, self.scales, self.offsets, self.bias) if t is not None]
        return sum(t.numel() * t.element_size() for t in parts)

    def rows(self, ids: Tensor, flags: tuple[str, ...] | None = None) -> Tensor:
        """Rows of a weight of float32, bfloat16 or blocks as float32: ids [N] -> [N, I]."""
        if self.is_packed:
            raise NativeError("rows of a packed weight are not to be had: take them before it is packed")
        ids, out = ids.to(torch.int64).contiguous(), torch.empty(len(ids), self.num_inputs)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_outputs:
            raise NativeError(f"rows are asked for that are not among the weight's {self.num_outputs}")
        return self._call(load(flags).amphista_rows, ids, out)

    def multiply(self, rows: Tensor, flags: tuple[str, ...] | None = None) -> Tensor:
        """The product of rows of float32 [N, I] and this weight: [N, O], as in a forward."""
        padded = torch.zeros(len(rows), rounded_up(self.num_inputs, PAD))
        padded[:, : self.num_inputs] = rows.detach()
        out, room = torch.empty(len(rows), self.num_outputs), torch.empty(padded.numel() + len(rows))
        return self._call(load(flags).amphista_product, padded, out, Address(room.data_ptr()))

    def _call(self, function: Any, given: Tensor, out: Tensor, *more: Any) -> Tensor:
        sizes = ctypes.c_int64(len(given)), ctypes.c_int(CREW.num_threads())
        record = ctypes.byref(self.record())
        function(record, Address(given.data_ptr()), sizes[0], Address(out.data_ptr()), sizes[1], *more)
        return out

    def record(self) -> ProductStruct:
        return ProductStruct(
            address(self.weight),
            address(self.scales),
            address(self.offsets),
            address(self.bias),
            self.kind,
            self.num_outputs,
            self.num_inputs,
        )


def rounded_up(count: int, multiple: int) -> int:
    """The least multiple that is not below."""
    return -(-count // multiple) * multiple


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers are; None for None."""
    return None if tensor is None else tensor.data_ptr()
