"""Probe rows: what a drafter lets the target read beside tokens (`Probes`), in every form of its forward.

Decoding: probes are the last nodes of a span's tree, and their prefix stands behind its rows in every layer. Training:
below each of many rows of a text stands a group of its own; the text is read first, without a gradient, which is
exact, since no token sees a probe; then all groups at once, with one, through the frozen layers.

Shapes: N rows, Q groups, M probes of each, T tokens, P prefix rows, J key-value heads, E head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from amphista.cache.hf import Rows
from amphista.cache.static import KVCache, LayerRows, RowsWithTail, sent
from amphista.errors import TargetError
from amphista.target.attention import Layout
from amphista.target.spans import Span
from amphista.target.spec import Probes

GROUPS_AT_ONCE = 64
Read = Callable[[Tensor, Layout, Sequence[Sequence[Rows]]], Tensor]


def embedded(embed: Callable[[Tensor], Tensor], spans: Sequence[Span], device: torch.device) -> Tensor:
    """Embeddings of all spans' rows [N, embedding size], the probes' inputs in their places; some span has probes."""
    token_ids = [token for span in spans for token in span.tree.tokens]
    probes = next(span.probes for span in spans if span.probes is not None)
    rows = embed(sent([max(token, 0) for token in token_ids], device))
    places = [row for row, token in enumerate(token_ids) if token < 0]
    inputs = probes.inputs[sent([-1 - token_ids[row] for row in places], device)]
    return rows.index_copy(0, sent(places, device), inputs.to(rows.dtype))


def layers_of(span: Span, *, in_pairs: int = 0) -> Sequence[Rows]:
    """Where a span's keys and values go, by layer; in_pairs: of so many numbers of a key, its first, those that are
    rotated together lie side by side."""
    layers = span.cache.layers
    if span.probes is None or not span.probes.prefix.shape[3]:
        return layers
    behind = tails(span.probes.prefix, len(layers), in_pairs=in_pairs)
    return [RowsWithTail(rows, *tail) for rows, tail in zip(layers, behind, strict=True)]


def tails(prefix: Tensor, num_layers: int, *, in_pairs: int) -> list[tuple[Tensor, Tensor]]:
    """The prefix as each layer's keys and values [J, P, E]."""
    if len(prefix) != num_layers:
        raise TargetError(f"probes bring a prefix for {len(prefix)} layers: {num_layers} keep keys and values")
    keys, values = prefix.unbind(1)
    if in_pairs:
        first = keys[..., :in_pairs].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        keys = torch.cat([first, keys[..., in_pairs:]], dim=-1)
    return list(zip(keys, values, strict=True))


@dataclass(frozen=True)
class _ReadRows:
    """Keys and values that were read, and a prefix: new rows are added to no cache, so that a gradient may pass."""

    rows: tuple[Tensor, Tensor]
    tail: tuple[Tensor, Tensor]
    num_rows: int

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(self.rows, (keys, values), self.tail, strict=True)
        first, second = (torch.cat([old, new, tail[None].to(new.dtype)], dim=2) for old, new, tail in parts)
        return first, second


def _read(rows: LayerRows, num_rows: int) -> tuple[Tensor, Tensor]:
    """Copies: what inference mode has made no gradient may be told of."""
    assert rows.keys is not None and rows.values is not None
    return rows.keys[:, :, :num_rows].clone(), rows.values[:, :, :num_rows].clone()


@dataclass(frozen=True)
class Groups:
    """A group of probes behind each of the positions [Q] of a text. in_pairs: as in `layers_of`.

    What would stand beyond the context, where nothing is aimed at, stands at its end.
    """

    probes: Probes
    positions: Tensor
    max_positions: int
    in_pairs: int

    def states(self, read: Read, cache: KVCache) -> Tensor:
        """Hidden states [Q, M, D] of all groups, the text being read; read: a forward over embeddings.

        Some groups at a time, whose forward is done again for their gradient: all of them would not fit in memory.
        """
        size = cache.num_committed
        text = [_read(rows, size) for rows in cache.layers]

        def states(inputs: Tensor, prefix: Tensor, some: Tensor) -> Tensor:
            behind = tails(prefix, len(text), in_pairs=self.in_pairs)
            rows = [[_ReadRows(*parts, size)] for parts in zip(text, behind, strict=True)]
            layout = self._layout(some, size)
            hidden = read(inputs.repeat(len(some), 1)[None].to(text[0][0].dtype), layout, rows)
            return hidden.view(len(some), -1, hidden.shape[-1])

        given, parts = (self.probes.inputs, self.probes.prefix), self.positions.split(GROUPS_AT_ONCE)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(states, *given, some, use_reentrant=False) for some in parts])
        return torch.cat([states(*given, some) for some in parts])

    def _layout(self, positions: Tensor, num_read: int) -> Layout:
        """Of some groups: each sees the text up to its position, itself and the prefix."""
        device, size, prefix = positions.device, self.probes.num_rows, self.probes.prefix.shape[3]
        behind = (positions[:, None] + torch.arange(1, size + 1, device=device)).flatten()
        rows, text = torch.arange(len(behind), device=device), torch.arange(num_read, device=device)
        seen = text <= positions.repeat_interleave(size)[:, None]
        own = (rows[:, None] // size == rows // size) & (rows[:, None] >= rows)
        visible = torch.cat([seen, own, own.new_ones(len(own), prefix)], dim=1)
        behind = behind.clamp_max(self.max_positions - 1)
        keys = torch.cat([text, behind, text.new_zeros(prefix)])
        free = torch.arange(len(keys), device=device) >= num_read + len(behind)
        return Layout(behind[None], keys[None], visible[None], free)
