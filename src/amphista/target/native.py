"""The C step (amphista.native) over the lean form's own weights: spans of token ids and parents on `KVCache`s.

On a CPU, in float32, bfloat16 or with weights of 8 bits. The torch form reads the same weights and the same cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amphista.cache.static import KVCache
from amphista.kernels.linear import PackedLinear
from amphista.native.build import NativeError
from amphista.native.pages import Arena
from amphista.native.step import NativeLayer, NativeModel, NativeOutput, NativeSpan, Shape, Weight
from amphista.target.lean import LeanLayer, LeanModel


class PlainLinear(PackedLinear):
    """y = x W^T + b, the weight copied as it lies into huge pages: the torch form and the C step both read it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(_ARENA.copy(weight), bias, pack=False)


_ARENA = Arena()


@dataclass(frozen=True)
class SpanRows:
    """One sequence's nodes: a parent is an earlier node, or -1: then it follows the cache's committed rows."""

    token_ids: Sequence[int]
    parents: Sequence[int]
    cache: KVCache


class NativeForward:
    """The forward of a lean model whose weights lie as they are (not packed), in C. raises NativeError."""

    def __init__(
        self,
        lean: LeanModel,
        windows: Sequence[int | None],
        *,
        int8: bool = False,
        flags: tuple[str, ...] | None = None,
    ) -> None:
        """windows: of each layer, positions a row sees, itself included; None: all. int8: round the weights."""
        if lean.device.type != "cpu":
            raise NativeError(f"the C step runs on a CPU, not on {lean.device.type}")
        self._lean, self._int8 = lean, int8
        norm = lean.layers[0].attention_norm
        scale = float(lean._heads_scale[0])
        shape = Shape(lean.num_heads, lean.num_key_value_heads, lean.head_size, norm.eps, scale)
        self.layers = [self._layer(layer, window) for layer, window in zip(lean.layers, windows, strict=True)]
        self.head, embedding = self._weight(lean.head), Weight.of(lean._embedding)
        self.model = NativeModel(shape, self.layers, lean._norm.weight, embedding, self.head, flags=flags)
        self._row = torch.empty(1, lean.num_key_value_heads, 0, lean.head_size, dtype=self.model.cache_dtype)

    def _weight(self, product: object) -> Weight:
        if not isinstance(product, PackedLinear) or product.is_packed:
            raise NativeError("the C step reads weights as they lie: these are packed")
        return self._made(product._weight, product.bias)

    def _made(self, weight: Tensor, bias: Tensor | None) -> Weight:
        return Weight.of_8_bits(weight, bias, _ARENA) if self._int8 else Weight.of(weight, bias)

    def _halves(self, product: object) -> list[Weight]:
        assert isinstance(product, PackedLinear)
        biases = [None, None] if product.bias is None else product.bias.chunk(2)
        return [self._made(weight, bias) for weight, bias in zip(product._weight.chunk(2), biases, strict=True)]

    def _layer(self, layer: LeanLayer, window: int | None) -> NativeLayer:
        gate, up = self._halves(layer.gate_up)
        return NativeLayer(
            layer.attention_norm.weight,
            self._weight(layer.qkv),
            None if layer.query_norm is None else layer.query_norm.weight,
            None if layer.key_norm is None else layer.key_norm.weight,
            self._weight(layer.output),
            layer.mlp_norm.weight,
            gate,
            up,
            self._weight(layer.down),
            window,
        )

    def __call__(
        self, spans: Sequence[SpanRows], wanted: Sequence[int] | None = None, *, with_logits: bool = True
    ) -> NativeOutput:
        """One forward over all spans' rows, which their caches then hold behind the committed ones.

        wanted: rows of the flat row whose logits are asked for, None for all. with_logits: not the choices alone.
        """
        for span in spans:
            self._make_room(span)
        native = [
            NativeSpan(
                span.token_ids,
                span.parents,
                [_held(layer.keys) for layer in span.cache.layers],
                [_held(layer.values) for layer in span.cache.layers],
                span.cache.num_committed,
            )
            for span in spans
        ]
        num_rows = sum(len(span.token_ids) for span in spans)
        furthest = max(span.cache.num_committed + len(span.token_ids) for span in spans)
        turns = self._lean.rotary.reserve(furthest)
        output = self.model.forward(
            native, range(num_rows) if wanted is None else wanted, turns, with_logits=with_logits
        )
        for span in spans:
            for layer in span.cache.layers:
                layer.num_rows = span.cache.num_committed + len(span.token_ids)
        return output

    def _make_room(self, span: SpanRows) -> None:
        end = span.cache.num_committed + len(span.token_ids)
        for layer in span.cache.layers:
            if end > layer.capacity:
                layer.reserve(self._row, self._row, layer.next_capacity(end))


def _held(rows: Tensor | None) -> Tensor:
    assert rows is not None
    return rows
