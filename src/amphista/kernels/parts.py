"""Parts of a transformer layer that the fast forms of target and drafter share: the norm, and rotation by pairs.

The two numbers of a head that are rotated together are stored side by side, so that rotating is one product of complex
numbers (arXiv 2104.09864): `paired` puts the rows of a weight, or of a norm over heads, in that order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.rms_norm(rows, self.weight.shape, self.weight, self.eps)


def paired(rows: Tensor, head_size: int) -> Tensor:
    """Rows [heads * E, ...], of which i and i + E / 2 of a head are rotated together: these two side by side."""
    heads = rows.detach().view(-1, 2, head_size // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)
