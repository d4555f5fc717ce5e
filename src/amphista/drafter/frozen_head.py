"""The target's LM head over a draft vocabulary as training multiplies with it.

Shapes: M rows, D hidden size, N draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROWS_IN_CACHE = 64  # whose logits over a draft vocabulary stay near the processor from one pass to the next


class FrozenHead:
    """The target's LM head over a draft vocabulary forwards, and back to states."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [N, D], bias [N]; products are in the weight's type."""
        self.dtype, self._weight, self._bias = weight.dtype, weight, bias

    def logits(self, states: Tensor) -> Tensor:
        """States [M, D] -> logits [M, N]; without gradient."""
        return functional.linear(states, self._weight, self._bias)

    def probabilities(self, states: Tensor) -> Tensor:
        """States [M, D] -> the target's distributions [M, N] in float32 or wider, some rows at a time."""
        wide = torch.promote_types(self.dtype, torch.float32)
        probs = torch.empty(len(states), len(self._weight), dtype=wide, device=states.device)
        for rows, out in zip(states.split(ROWS_IN_CACHE), probs.split(ROWS_IN_CACHE), strict=True):
            logits = self.logits(rows)
            torch.sub(logits, logits.amax(-1, keepdim=True), out=out).exp_()
            out.div_(out.sum(-1, keepdim=True))
        return probs

    def gradient(self, upstream: Tensor) -> Tensor:
        """Gradient of the logits [M, N] -> gradient of the states [M, D]."""
        return upstream @ self._weight
