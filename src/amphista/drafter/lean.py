"""Drafters to decode with: the same weights as the modules they were trained as, in as few and as cheap steps.

Projections of one input stand side by side in one packed product, the numbers of a head that are rotated together side
by side in their rows. Of the last staged layer only keys and values
are needed of every row: its output, and what follows, is made for the last row alone.

Where the processor multiplies bfloat16 itself, weights are held and products made in it, half the bytes to read: a
draft can afford it, since it decides nothing. Rows, sums and attention stay in the drafter's own type.

Equal to the training form (tests/laws/test_parity.py); what was trained is gone from the module once this stands.

Shapes: N rows, S rows with those before them, K heads, D hidden size, H query heads, J key-value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from amphista.drafter.layers import (
    LayerCache,
    LayerSizes,
    ResidualBlock,
    RMSNorm,
    TransformerLayer,
    mix,
    rotary_angles,
)
from amphista.kernels.linear import PackedLinear
from amphista.kernels.parts import Norm, RotaryTable, paired


class Projection:
    """A product in the type of its weights, for rows of another: [N, I] -> [N, O]."""

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None, *, dtype: torch.dtype
    ) -> None:
        """Weights [O, I] of one I, their outputs one behind the other; a bias each, None for 0."""
        held = [None if bias is None else bias.detach().to(dtype) for bias in biases or [None] * len(weights)]
        self._product = PackedLinear.side_by_side([weight.detach().to(dtype) for weight in weights], held)

    @classmethod
    def of(cls, *layers: nn.Linear, dtype: torch.dtype) -> Projection:
        return cls([layer.weight for layer in layers], [layer.bias for layer in layers], dtype=dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        return self._product(rows.to(self._product.dtype)).to(rows.dtype)

    def added(self, rows: Tensor, residual: Tensor) -> Tensor:
        """residual [N, O] + the product, in the residual's type."""
        if self._product.dtype is residual.dtype:
            return self._product.added(rows, residual)
        return residual + self._product(rows.to(self._product.dtype))


def _rotary_table(sizes: LayerSizes, device: torch.device) -> RotaryTable:
    def make(num_positions: int) -> Tensor:
        angles = rotary_angles(torch.arange(num_positions, device=device), sizes.head_size, sizes.rope_theta)
        return torch.polar(torch.ones_like(angles), angles)

    return RotaryTable(make)


class LeanLayer:
    """One transformer layer of a drafter; rows [N, D]."""

    def __init__(self, layer: TransformerLayer, dtype: torch.dtype) -> None:
        attention, mlp = layer.attention, layer.mlp
        self._sizes = layer.sizes
        size = layer.sizes.head_size
        query, key = (paired(part.weight, size) for part in (attention.query, attention.key))
        self._attention_norm, self._mlp_norm = Norm.of(layer.attention_norm), Norm.of(layer.mlp_norm)
        self._qkv = Projection([query, key, attention.value.weight], dtype=dtype)
        self._output = Projection.of(attention.output, dtype=dtype)
        self._gate_up = Projection.of(mlp.gate, mlp.up, dtype=dtype)
        self._down = Projection.of(mlp.down, dtype=dtype)

    def __call__(
        self,
        rows: Tensor,
        *,
        turn: Tensor | None = None,
        cache: LayerCache | None = None,
        is_causal: bool = False,
        only_last: bool = False,
        num_sequences: int = 1,
    ) -> Tensor:
        """Rows [N, D] -> [N, D], or [1, D] where only the last one's output is asked for; of several sequences, as many
        of each, side by side.

        turn: complex [N, 1, E / 2], None without positions. With a cache rows see all before them and themselves.
        """
        sizes = self._sizes
        heads, key_heads, size = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_size
        projected = self._qkv(self._attention_norm(rows)).view(len(rows), -1, size)
        if turn is not None:
            exact = projected.to(torch.promote_types(rows.dtype, torch.float32))  # what can be seen as complex numbers
            pairs = torch.view_as_complex(exact.view(len(rows), -1, size // 2, 2))
            pairs.narrow(1, 0, heads + key_heads).mul_(turn)  # in place: nobody else reads the projections
            projected = exact.to(rows.dtype)
        queries, keys, values = projected.split((heads, key_heads, key_heads), dim=1)
        keys = keys.view(num_sequences, -1, key_heads, size).transpose(1, 2)
        values = values.view(num_sequences, -1, key_heads, size).transpose(1, 2)
        if cache is not None:
            keys, values = cache.append(keys, values)
        if only_last:
            rows, queries = rows[-1:], queries[-1:]
        queries = queries.view(num_sequences, -1, heads, size).transpose(1, 2)
        mixed = mix(queries, keys, values, None, is_causal=is_causal)
        rows = self._output.added(mixed.transpose(1, 2).reshape(len(rows), -1), rows)
        gate, up = self._gate_up(self._mlp_norm(rows)).chunk(2, dim=-1)
        return self._down.added(functional.silu(gate) * up, rows)


class LeanStage:
    """One staged adaptation layer: a state fused with the next token's embedding, then a causal layer."""

    def __init__(self, state_norm: RMSNorm, fuse: nn.Linear, layer: TransformerLayer, dtype: torch.dtype) -> None:
        self._norm, self._fuse = Norm.of(state_norm), Projection.of(fuse, dtype=dtype)
        self._layer = LeanLayer(layer, dtype)

    def __call__(self, rows: Tensor, embedded: Tensor, turn: Tensor, cache: LayerCache, *, only_last: bool) -> Tensor:
        """Rows [N, D] and normed embeddings [N, embedding size] -> [N, D] or [1, D]."""
        fused = self._fuse(torch.cat([self._norm(rows), embedded], dim=-1))
        return self._layer(fused, turn=turn, cache=cache, is_causal=True, only_last=only_last)


class LeanHeads:
    """Residual heads: those that read one state in one product for the first block of each."""

    def __init__(self, heads: Sequence[Sequence[ResidualBlock]], dtype: torch.dtype) -> None:
        """Blocks of each head, first to last; all heads have as many."""
        first, *further = zip(*heads, strict=True)
        self._num_heads = len(first)
        self._first = Projection.of(*(block.linear for block in first), dtype=dtype)
        self._further = [[Projection.of(block.linear, dtype=dtype) for block in blocks] for blocks in further]

    def __call__(self, state: Tensor) -> Tensor:
        """States [B, D] -> [B, heads, D]."""
        states = state[:, None] + functional.silu(self._first(state)).view(len(state), self._num_heads, -1)
        for blocks in self._further:
            inner = torch.stack([block(states[:, k]) for k, block in enumerate(blocks)], dim=1)
            states = states + functional.silu(inner)
        return states


class LeanAmphista:
    """Staged adaptation, heads and auto-embedding block of a trained Amphista drafter."""

    def __init__(self, drafter: Any, sizes: LayerSizes, dtype: torch.dtype) -> None:
        """drafter: the Amphista whose weights are taken; sizes: of its staged layers."""
        self._embedding_norm = Norm.of(drafter.embedding_norm) if drafter.stages else None
        self._hidden_norm = None if drafter.stages else Norm.of(drafter.hidden_norm)
        self._stages = [LeanStage(stage.state_norm, stage.fuse, stage.layer, dtype) for stage in drafter.stages]
        parts = (drafter.heads[: drafter.split], drafter.heads[drafter.split :])
        self._heads = [LeanHeads([[head] for head in part], dtype) if part else None for part in parts]
        block = drafter.auto_embedding
        self._encoder = [LeanLayer(layer, dtype) for layer in block.layers] if block is not None else []
        self._position = None if block is None or block.position is None else block.position.detach()
        self._is_causal = block is not None and block.is_causal
        self._output_norm = Norm.of(drafter.output_norm)
        self._rotary = _rotary_table(sizes, drafter.device)

    def adapt(self, hidden: Tensor, embedded: Tensor, first: int, caches: Sequence[LayerCache]) -> list[Tensor]:
        """Hidden states [N, D] from row `first` on, embeddings of the next tokens -> what the heads read, [1, D] each:
        those up to the split, those above."""
        if self._embedding_norm is None:
            assert self._hidden_norm is not None
            return [self._hidden_norm(hidden[-1:])] * 2
        embedded = self._embedding_norm(embedded)
        end = first + len(hidden)
        turn = self._rotary.reserve(end)[first:end, None]
        rows, read = hidden, []
        for index, (stage, cache) in enumerate(zip(self._stages, caches, strict=True)):
            rows = stage(rows, embedded, turn, cache, only_last=index + 1 == len(self._stages))
            read.append(rows[-1:])
        return [read[0], read[-1]]

    def head_states(self, read: Sequence[Tensor]) -> Tensor:
        """What `adapt` gave, of B sequences [B, D] each -> [B, K, D]."""
        slots = [heads(state) for heads, state in zip(self._heads, read, strict=True) if heads is not None]
        states = torch.cat(slots, dim=1)
        if self._position is not None:
            states = states + self._position
        shape, rows = states.shape, states.flatten(0, 1)
        for layer in self._encoder:
            rows = layer(rows, is_causal=self._is_causal, num_sequences=shape[0])
        return self._output_norm(rows).view(shape)
