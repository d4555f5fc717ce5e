"""Causal layers of a drafter over the context: of the target's states alone, or fused with the tokens that followed.

Row j stands at position j and is made once, of h_j and x_{j+1}; what is drafted never enters a cache.

Shapes: B sequences, T rows, P selected rows, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amphista.drafter.layers import LayerSizes, RMSNorm, RowCache, TransformerLayer


def causally(
    layer: TransformerLayer, x: Tensor, positions: Tensor, cache: RowCache | None = None, select: Tensor | None = None
) -> Tensor:
    """A layer for rows x [B, T, D] at positions [1, T], each of which sees itself and all rows before it, those in the
    cache too; -> [B, T, D], or of the flat rows `select` [P] alone [P, D]."""
    mask = None
    if cache is not None and cache.num_rows > 0:
        keys = torch.arange(cache.num_rows + x.shape[1], device=x.device)
        mask = (keys[None, :] <= positions[0][:, None])[None, None]
    output: Tensor = layer(x, positions=positions, mask=mask, is_causal=mask is None, cache=cache, select=select)
    return output


class StagedAdaptation(nn.Module):
    """One stage: fuse a state with the next token's embedding, then one causal layer."""

    def __init__(self, sizes: LayerSizes, embedding_size: int) -> None:
        super().__init__()
        self.state_norm = RMSNorm(sizes.hidden_size, sizes.norm_eps)
        self.fuse = nn.Linear(sizes.hidden_size + embedding_size, sizes.hidden_size, bias=False)
        self.layer = TransformerLayer(sizes)
        with torch.no_grad():  # W = [I 0]: the stage starts as the identity on the normed state
            self.fuse.weight.zero_()
            self.fuse.weight[:, : sizes.hidden_size].copy_(torch.eye(sizes.hidden_size))

    def forward(
        self,
        x: Tensor,
        embedded: Tensor,
        positions: Tensor,
        cache: RowCache | None = None,
        select: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D], normed embeddings [B, T, embedding size], positions [1, T] -> [B, T, D], or of the flat rows
        `select` [P] alone [P, D]."""
        return causally(self.layer, self.fused(x, embedded), positions, cache, select)

    def fused(self, x: Tensor, embedded: Tensor) -> Tensor:
        """What the layer reads: x [..., D] and normed embeddings [..., embedding size] -> [..., D]."""
        fused: Tensor = self.fuse(torch.cat([self.state_norm(x), embedded], dim=-1))
        return fused
