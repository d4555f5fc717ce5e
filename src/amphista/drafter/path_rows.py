"""A layer for some rows more on each of some paths: they see rows of a context, which many paths share, and the path's.

Rows of a context are cached, or made of a text at once; those of a path are made while it is drafted, and end with it.

Shapes: n or m paths, i rows of a path, r of them new, J key-value heads, G query heads for each, H = J * G, S rows of a
context, T rows of a text, B sequences, E head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amphista.drafter.layers import TransformerLayer, rotary_tables


class Contexts(NamedTuple):
    """What stands before some paths: keys and values [J, S, E] of each sequence; whose each path is, `owners` [n],
    ascending; how many of those rows it sees, `seen` [n]. `ends` [n]: the position of its first row, by default `seen`.
    """

    rows: Sequence[tuple[Tensor, Tensor]]
    owners: Tensor
    seen: Tensor
    ends: Tensor | None = None


def step(
    layer: TransformerLayer, x: Tensor, own: tuple[Tensor, Tensor], before: Contexts, asking: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows x [n, r, D] more on each path, which see each other, behind its own keys and values [n, J, i, E] -> the
    layer's outputs [n, r, D], and the keys and values [n, J, i + r, E].

    asking: what the outputs start from in the place of x, which others still see there.
    """
    starts = (before.seen if before.ends is None else before.ends) + own[0].shape[2]
    positions = starts[:, None] + torch.arange(x.shape[1], device=x.device)
    rotary = rotary_tables(positions, layer.sizes.head_size, layer.sizes.rope_theta)
    normed = layer.attention_norm(x)
    made = layer.attention.keys_values(normed, rotary)
    keys, values = (torch.cat(pair, dim=2) for pair in zip(own, made, strict=True))
    if asking is not None:
        x, normed = asking, layer.attention_norm(asking)
    return looked_up(layer, x, layer.attention.queries(normed, rotary), (keys, values), before), keys, values


def looked_up(
    layer: TransformerLayer, x: Tensor, queries: Tensor, own: tuple[Tensor, Tensor], before: Contexts
) -> Tensor:
    """The layer for rows x [n, r, D], whose queries [n, H, r, E] see what there is, and which are seen by none."""
    scaled = queries.flatten(1, 2) * layer.sizes.head_size**-0.5
    mixed = mix(scaled, *own, before).view(queries.shape)
    return layer.widened(x + layer.attention.output(mixed.transpose(1, 2).flatten(2)))


class MadeRows:
    """Keeps what a layer makes of a text [B, J, T, E], with its gradient: a cache that nothing stood in before."""

    num_rows = 0
    keys: Tensor
    values: Tensor

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The rows there are."""
        self.keys, self.values = keys, values
        return keys, values


def mix(queries: Tensor, keys: Tensor, values: Tensor, before: Contexts) -> Tensor:
    """Attention of scaled queries [H * r, E] of a path over the rows of its context it sees, and its own;
    [n, H * r * E]."""
    mixed, counts = [], torch.bincount(before.owners, minlength=len(before.rows)).tolist()
    parts = (part.split(counts) for part in (queries, keys, values, before.seen))
    for query, own_keys, own_values, seen, context in zip(*parts, before.rows, strict=True):
        if len(query):
            mixed.append(_mix_of_one(query, own_keys, own_values, seen, context))
    return torch.cat(mixed)


def _mix_of_one(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
    """The same of paths [m] below one context: their queries lie one below the other over its keys."""
    (context_keys, context_values), (number, num_kv_heads, _, size) = context, keys.shape
    grouped = query.reshape(number, num_kv_heads, -1, size)  # [m, J, G * r, E]
    below = grouped.transpose(0, 1).flatten(1, 2)  # [J, m * G * r, E]
    of_context = (below @ context_keys.transpose(1, 2)).unflatten(1, (number, -1)).transpose(0, 1)  # [m, J, G * r, S]
    is_hidden = torch.arange(context_keys.shape[1], device=seen.device) >= seen[:, None]
    of_context = of_context.masked_fill(is_hidden[:, None, None], -torch.inf)
    scores = torch.cat([of_context, grouped @ keys.transpose(2, 3)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    over_context, over_own = weights.split([context_keys.shape[1], keys.shape[2]], dim=-1)
    mixed = over_context.transpose(0, 1).flatten(1, 2) @ context_values  # [J, m * G * r, E]
    together: Tensor = mixed.unflatten(1, (number, -1)).transpose(0, 1) + over_own @ values
    return together.flatten(1)
