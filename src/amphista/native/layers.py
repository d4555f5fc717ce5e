"""Transformer layers as records of the C step (layer.h, experts.h): of the target and of drafters.

Shapes: D hidden size, E head size, X experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amphista.native.weights import KINDS, PAD, Address, ProductStruct, Weight, address, rounded_up


class _Mlp(ctypes.Structure):
    _fields_ = [(name, ProductStruct) for name in ("gate", "up", "down")]


class _Experts(ctypes.Structure):
    _fields_ = [
        ("router", ProductStruct),
        ("each", ctypes.POINTER(_Mlp)),
        ("correction", Address),
        *((name, ctypes.c_int32) for name in ("num_experts", "top_k", "by_sigmoid", "is_normed", "has_shared")),
        *((name, ctypes.c_float) for name in ("least", "more", "scale")),
    ]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        *((name, Address) for name in ("attention_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, Address) for name in ("attention_out_norm", "mlp_out_norm")),
        *((name, ProductStruct) for name in ("qkv", "output")),
        ("mlp", _Mlp),
        ("experts", ctypes.POINTER(_Experts)),
        ("sinks", Address),
        *((name, ctypes.c_int32) for name in ("window", "turn")),
    ]


class StackStruct(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(LayerStruct)),
        *(
            (name, ctypes.c_int32)
            for name in ("num_layers", "hidden", "heads", "key_heads", "head_size", "inner", "cache_kind")
        ),
        *((name, ctypes.c_float) for name in ("eps", "scale", "residual")),
        *((name, ctypes.c_int32) for name in ("turns", "has_wide_norms", "has_gelu")),
        *((name, ctypes.c_float) for name in ("score_cap", "gate_slope", "gate_limit")),
    ]


@dataclass(frozen=True)
class NativeMlp:
    """What widens rows and narrows them again: down(silu(gate) up)."""

    gate: Weight
    up: Weight
    down: Weight

    @property
    def inner_size(self) -> int:
        return self.down.num_inputs

    def record(self, held: list[Any]) -> dict[str, Any]:
        """Fields of a layer; what has to live as long as they do is added to `held`."""
        return {"mlp": _Mlp(self.gate.record(), self.up.record(), self.down.record())}


@dataclass(frozen=True)
class NativeExperts:
    """Several of them, of which each row takes `top_k` (experts.h).

    router: [X, D], or [X + 1, D] where its last output says how much of the shared one a row takes. each: X, the shared
    one behind them, if there is one. correction: [X], added to scores where the best are chosen. by_sigmoid: scores are
    no softmax; is_normed: those chosen are divided by their sum, which is at least `least`, and `more`; scale: what
    they are multiplied by then.
    """

    router: Weight
    each: Sequence[NativeMlp]
    top_k: int
    correction: Tensor | None = None
    by_sigmoid: bool = False
    is_normed: bool = True
    has_shared: bool = False
    least: float = 0.0
    more: float = 0.0
    scale: float = 1.0

    @property
    def inner_size(self) -> int:
        return max(mlp.inner_size for mlp in self.each)

    def record(self, held: list[Any]) -> dict[str, Any]:
        """Fields of a layer; what has to live as long as they do is added to `held`."""
        each = (_Mlp * len(self.each))(*(mlp.record(held)["mlp"] for mlp in self.each))
        record = _Experts(
            self.router.record(),
            each,
            padded(self.correction, held),
            len(self.each) - self.has_shared,
            self.top_k,
            self.by_sigmoid,
            self.is_normed,
            self.has_shared,
            self.least,
            self.more,
            self.scale,
        )
        held += [each, record]
        return {"experts": ctypes.pointer(record)}


@dataclass(frozen=True)
class NativeLayer:
    """One decoder layer. Rows of `qkv`, and norms over heads, have the two numbers rotated together side by side.

    window: how many positions a row sees, itself included; None: all. out norms: of what is added to the states. turn:
    which of the rotations. sinks: [H], of each query head a score beside those of keys.
    """

    attention_norm: Tensor | None
    qkv: Weight
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Weight
    mlp_norm: Tensor | None
    mlp: NativeMlp | NativeExperts
    window: int | None
    attention_out_norm: Tensor | None = None
    mlp_out_norm: Tensor | None = None
    turn: int = 0
    sinks: Tensor | None = None


@dataclass(frozen=True)
class DecoderShape:
    """Dimensions and constants of a decoder.

    scale: of queries; residual_scale: of what layers add to the states; num_turns: rotations there are; has_wide_norms:
    norms of queries and keys are over all heads; has_gelu: in place of silu; score_cap: what scores stay below in size,
    0: nothing; embedding_scale, input_scale: of embeddings, and of inputs in their place.
    """

    num_heads: int
    num_key_value_heads: int
    head_size: int
    eps: float
    scale: float
    residual_scale: float = 1.0
    num_turns: int = 1
    has_wide_norms: bool = False
    has_gelu: bool = False
    score_cap: float = 0.0
    gate_slope: float = 1.0
    gate_limit: float = 0.0
    embedding_scale: float = 1.0
    input_scale: float = 1.0


def stack_record(
    shape: DecoderShape, layers: Sequence[NativeLayer], hidden_size: int, cache_dtype: torch.dtype, held: list[Any]
) -> StackStruct:
    """Layers of one shape; what has to live as long as the record is added to `held`."""
    records = (LayerStruct * len(layers))(*(_layer_record(layer, held) for layer in layers))
    held += [layers, records]
    return StackStruct(
        records,
        len(layers),
        hidden_size,
        shape.num_heads,
        shape.num_key_value_heads,
        shape.head_size,
        max((layer.mlp.inner_size for layer in layers), default=0),
        KINDS[cache_dtype],
        shape.eps,
        shape.scale,
        shape.residual_scale,
        shape.num_turns,
        shape.has_wide_norms,
        shape.has_gelu,
        shape.score_cap,
        shape.gate_slope,
        shape.gate_limit,
    )


def _layer_record(layer: NativeLayer, held: list[Any]) -> LayerStruct:
    return LayerStruct(
        padded(layer.attention_norm, held),
        padded(layer.query_norm, held),
        padded(layer.key_norm, held),
        padded(layer.mlp_norm, held),
        padded(layer.attention_out_norm, held),
        padded(layer.mlp_out_norm, held),
        layer.qkv.record(),
        layer.output.record(),
        sinks=padded(layer.sinks, held),
        window=layer.window or 0,
        turn=layer.turn,
        **layer.mlp.record(held),
    )


def padded(vector: Tensor | None, held: list[Any]) -> int | None:
    """The address of a float32 copy with zeros behind it, added to `held`; None for None."""
    if vector is None:
        return None
    copy = torch.zeros(rounded_up(len(vector), PAD))
    copy[: len(vector)] = vector.detach()
    held.append(copy)
    return address(copy)
