"""The C step's weights and forward as Python records: what step.c computes, over spans of any number of sequences.

Tensors are handed over by address and kept alive here; nothing of `transformers` is known. One forward a thread at a
time shares a model with those of other threads: room to work in is kept for each thread.

Shapes: N rows of all spans, W rows whose logits are asked for, D hidden size, V vocabulary, J key-value heads, E head
size.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amphista.errors import NativeError
from amphista.native.build import load
from amphista.native.huge_pages import Arena

PAD = 64  # step.c reads padded rows of small vectors: norms
BLOCK, GROUP, LEVELS, ZERO = 32, 4, 127, 128  # of packed 8-bit weights: outputs side by side, inputs side by side
KINDS = {torch.float32: 0, torch.bfloat16: 1}
INT8, SIDE_BY_SIDE = 2, 3
BLOCK_KINDS = {2: 4, 18: 5, 20: 6, 22: 7, 24: 8, 34: 9, 144: 10, 176: 11, 210: 12}  # of a GGUF file, by a block's bytes
BLOCK_NUMBERS = {2: 1, 144: 256, 176: 256, 210: 256}  # in a block; of all others 32
HALF_BYTES, HALVES = 2, 32  # float16 is read by so many
WRONG = {
    1: "its spans do not follow each other",
    2: "a parent does not come before its row in the same span",
    3: "a token id is outside the vocabulary",
    4: "a position is beyond the rotary table",
    5: "a cache has no room for its rows",
    6: "logits of a row are asked for that is not there",
    7: "the workspace is too small",
}
Address = ctypes.c_void_p


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, Address) for name in ("weight", "scales", "offsets", "bias")),
        *((name, ctypes.c_int32) for name in ("kind", "outputs", "inputs", "unused")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, Address) for name in ("attention_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, _Product) for name in ("qkv", "output", "gate", "up", "down")),
        *((name, ctypes.c_int32) for name in ("window", "unused")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", Address),
        *((name, _Product) for name in ("embedding", "head")),
        *(
            (name, ctypes.c_int32)
            for name in ("num_layers", "hidden", "heads", "key_heads", "head_size", "inner", "cache_kind")
        ),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
        ("unused", ctypes.c_int32),
    ]


class _Span(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.POINTER(Address)) for name in ("keys", "values")),
        ("capacity", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("first", "count", "committed", "unused")),
    ]


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, Address) for name in ("ids", "parents")),
        ("spans", ctypes.POINTER(_Span)),
        *((name, Address) for name in ("wanted", "turns", "hidden", "logits", "choices", "workspace")),
        ("workspace_bytes", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in ("num_rows", "num_spans", "num_wanted", "num_turns", "num_threads", "unused")
        ),
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
        numbers = plain.new_zeros(_up(outputs, BLOCK), _up(inputs, GROUP), dtype=torch.int8)
        numbers[:outputs, :inputs] = (plain / scales[:, None]).round().to(torch.int8)
        offsets = numbers.sum(1, dtype=torch.int32) * -ZERO
        blocks = numbers.view(-1, BLOCK, numbers.shape[1] // GROUP, GROUP).transpose(1, 2)
        blocks = blocks.contiguous() if arena is None else arena.copy(blocks)
        bias = None if bias is None else bias.detach().float().clone()
        return cls(outputs, inputs, INT8, blocks, scales, offsets, bias)

    @classmethod
    def of_blocks(cls, blocks: Tensor, bias: Tensor | None = None, arena: Arena | None = None) -> Weight:
        """A GGUF file's own blocks, uint8 [O, blocks in a row, bytes of a block], which tell the kind; or float32 [O, I].

        raises NativeError for blocks of an unknown kind.
        """
        held = blocks.contiguous() if arena is None else arena.copy(blocks)
        if blocks.dtype is torch.float32:
            return cls.of(held, bias)
        outputs, count, size = blocks.shape
        inputs = count * BLOCK_NUMBERS.get(size, 32)
        if blocks.dtype is not torch.uint8 or size not in BLOCK_KINDS or inputs % HALVES:
            raise NativeError(f"the C step has no weights in blocks of {size} bytes, {inputs} numbers a row")
        bias = None if bias is None else bias.detach().float().clone()
        return cls(outputs, inputs, BLOCK_KINDS[size], held, bias=bias)

    @classmethod
    def side_by_side(cls, parts: Sequence[Weight]) -> Weight:
        """Weights of the same inputs whose outputs follow each other, of float32 or blocks."""
        records = (_Product * len(parts))(*(part.record() for part in parts))
        weight = torch.frombuffer(bytearray(records), dtype=torch.uint8)
        outputs = sum(part.num_outputs for part in parts)
        return cls(outputs, parts[0].num_inputs, SIDE_BY_SIDE, weight, parts=tuple(parts))

    @property
    def num_bytes(self) -> int:
        """Bytes a product reads."""
        if self.parts:
            return sum(part.num_bytes for part in self.parts)
        parts = [t for t in (self.weight, self.scales, self.offsets, self.bias) if t is not None]
        return sum(t.numel() * t.element_size() for t in parts)

    def rows(self, ids: Tensor, flags: tuple[str, ...] | None = None) -> Tensor:
        """Rows of a weight of float32, bfloat16 or blocks as float32: ids [N] -> [N, I]."""
        ids, out = ids.to(torch.int64).contiguous(), torch.empty(len(ids), self.num_inputs)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_outputs:
            raise NativeError(f"rows are asked for that are not among the weight's {self.num_outputs}")
        call = load(flags).amphista_rows
        call(ctypes.byref(self.record()), _given(ids), ctypes.c_int64(len(ids)), _given(out), torch.get_num_threads())
        return out

    def multiply(self, rows: Tensor, flags: tuple[str, ...] | None = None) -> Tensor:
        """The product of rows of float32 [N, I] and a weight of float32 or blocks: [N, O], as in a forward."""
        rows, out = rows.detach().contiguous(), torch.empty(len(rows), self.num_outputs)
        call = load(flags).amphista_product
        call(ctypes.byref(self.record()), _given(rows), ctypes.c_int64(len(rows)), _given(out), torch.get_num_threads())
        return out

    def record(self) -> _Product:
        return _Product(
            _address(self.weight),
            _address(self.scales),
            _address(self.offsets),
            _address(self.bias),
            self.kind,
            self.num_outputs,
            self.num_inputs,
        )


@dataclass(frozen=True)
class NativeLayer:
    """One decoder layer. Rows of `qkv`, and norms over heads, have the two numbers rotated together side by side.

    window: how many positions a row sees, itself included; None: all.
    """

    attention_norm: Tensor
    qkv: Weight
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Weight
    mlp_norm: Tensor
    gate: Weight
    up: Weight
    down: Weight
    window: int | None


@dataclass(frozen=True)
class Shape:
    """Dimensions and constants of a decoder. scale: of queries."""

    num_heads: int
    num_key_value_heads: int
    head_size: int
    eps: float
    scale: float


@dataclass(frozen=True)
class NativeSpan:
    """One sequence's part of a forward.

    token_ids, parents: of each node; a parent is an earlier node, or -1: then it follows the committed rows.
    keys, values: of each layer [1, J, capacity, E]; new rows are written behind the `num_committed` ones.
    """

    token_ids: Sequence[int]
    parents: Sequence[int]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    num_committed: int


@dataclass(frozen=True)
class NativeOutput:
    """hidden: float32 [N, D] after the final norm. logits: float32 [W, V]. choices: int32 [W], the lowest id of each
    row's largest logit."""

    hidden: Tensor
    logits: Tensor
    choices: Tensor


class NativeModel:
    """A decoder of the Llama family in C. raises NativeError where the step cannot be built or does not fit."""

    def __init__(
        self,
        shape: Shape,
        layers: Sequence[NativeLayer],
        norm: Tensor,
        embedding: Weight,
        head: Weight,
        *,
        flags: tuple[str, ...] | None = None,
    ) -> None:
        self._library = load(flags)
        _check_sizes(self._library)
        self._library.amphista_workspace.restype = ctypes.c_int64
        self.hidden_size, self.vocab_size = embedding.num_inputs, head.num_outputs
        self.cache_dtype = torch.bfloat16 if embedding.weight.dtype is torch.bfloat16 else torch.float32
        self._held: list[Any] = [layers, embedding, head]
        self._layers = (_Layer * len(layers))(*(self._layer_record(layer) for layer in layers))
        self._model = _Model(
            self._layers,
            self._padded(norm),
            embedding.record(),
            head.record(),
            len(layers),
            self.hidden_size,
            shape.num_heads,
            shape.num_key_value_heads,
            shape.head_size,
            layers[0].down.num_inputs,
            KINDS[self.cache_dtype],
            shape.eps,
            shape.scale,
        )
        self.shape = shape
        self._local = threading.local()

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def _layer_record(self, layer: NativeLayer) -> _Layer:
        return _Layer(
            self._padded(layer.attention_norm),
            None if layer.query_norm is None else self._padded(layer.query_norm),
            None if layer.key_norm is None else self._padded(layer.key_norm),
            self._padded(layer.mlp_norm),
            *(part.record() for part in (layer.qkv, layer.output, layer.gate, layer.up, layer.down)),
            layer.window or 0,
        )

    def _padded(self, vector: Tensor) -> int | None:
        copy = torch.zeros(_up(len(vector), PAD))
        copy[: len(vector)] = vector.detach()
        self._held.append(copy)
        return _address(copy)

    def forward(self, spans: Sequence[NativeSpan], wanted: Sequence[int], turns: Tensor) -> NativeOutput:
        """One forward over the flat row of all spans' tokens.

        wanted: rows whose logits are asked for. turns: rotary table, complex64
        [positions, E / 2]. Keys and values of the new rows are written in place.
        """
        num_rows = sum(len(span.token_ids) for span in spans)
        flat = np.array([*_ids(spans), *_parents(spans), *wanted], dtype=np.int32)
        start, held = flat.ctypes.data, [flat, *(self._pointers(span) for span in spans)]
        hidden = torch.empty(num_rows, self.hidden_size)
        logits = torch.empty(len(wanted), self.vocab_size)
        choices = torch.empty(len(wanted), dtype=torch.int32)
        forward = _Forward(
            start,
            start + 4 * num_rows,
            self._spans(spans, held[1:]),
            start + 8 * num_rows,
            turns.data_ptr(),
            hidden.data_ptr(),
            _address(logits),
            choices.data_ptr(),
            num_rows=num_rows,
            num_spans=len(spans),
            num_wanted=len(wanted),
            num_turns=len(turns),
            num_threads=torch.get_num_threads(),
        )
        self._give_room(forward)
        code = self._library.amphista_forward(ctypes.byref(self._model), ctypes.byref(forward))
        if code:
            raise NativeError(f"the C step refuses a forward: {WRONG.get(code, code)}")
        return NativeOutput(hidden, logits, choices)

    def _pointers(self, span: NativeSpan) -> Any:
        """Addresses of all layers' keys, then of their values."""
        tensors = [*span.keys, *span.values]
        shape = (1, self.shape.num_key_value_heads, tensors[0].shape[2], self.shape.head_size)
        for tensor in tensors:
            if tensor.shape != shape or tensor.dtype is not self.cache_dtype or not tensor.is_contiguous():
                raise NativeError(
                    f"the C step refuses a cache of {tuple(tensor.shape)}, {tensor.dtype}: expected {shape}, "
                    f"{self.cache_dtype}, contiguous"
                )
        if len(span.keys) != self.num_layers or len(span.values) != self.num_layers:
            raise NativeError(f"the C step refuses a cache of {len(span.keys)} layers: expected {self.num_layers}")
        return (Address * len(tensors))(*(tensor.data_ptr() for tensor in tensors))

    def _spans(self, spans: Sequence[NativeSpan], pointers: Sequence[Any]) -> Any:
        records, first = [], 0
        for span, addresses in zip(spans, pointers, strict=True):
            keys = ctypes.cast(addresses, ctypes.POINTER(Address))
            behind = ctypes.addressof(addresses) + self.num_layers * ctypes.sizeof(Address)
            values = ctypes.cast(behind, ctypes.POINTER(Address))
            count = len(span.token_ids)
            records.append(_Span(keys, values, span.keys[0].shape[2], first, count, span.num_committed))
            first += count
        return (_Span * len(records))(*records)

    def _give_room(self, forward: _Forward) -> None:
        """Room to work in, kept by each thread for its next forward."""
        needed = self._library.amphista_workspace(ctypes.byref(self._model), ctypes.byref(forward))
        room: Tensor | None = getattr(self._local, "room", None)
        if room is None or room.numel() < needed + PAD:
            room = self._local.room = torch.empty(needed * 5 // 4 + PAD, dtype=torch.uint8)
        forward.workspace = -(-room.data_ptr() // PAD) * PAD
        forward.workspace_bytes = needed


def _ids(spans: Sequence[NativeSpan]) -> list[int]:
    return [token for span in spans for token in span.token_ids]


def _parents(spans: Sequence[NativeSpan]) -> list[int]:
    """Of all rows, counted in the flat row."""
    parents: list[int] = []
    for span in spans:
        first = len(parents)
        parents += [parent if parent < 0 else parent + first for parent in span.parents]
    return parents


def _check_sizes(library: ctypes.CDLL) -> None:
    sizes = (ctypes.c_int64 * 6)()
    library.amphista_sizes(sizes)
    ours = [ctypes.sizeof(record) for record in (_Product, _Layer, _Model, _Span, _Forward)]
    if list(sizes)[:5] != ours:
        raise NativeError(f"the C step has records of {list(sizes)[:5]} bytes: expected {ours}")


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _given(tensor: Tensor) -> ctypes.c_void_p:
    return Address(tensor.data_ptr())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
