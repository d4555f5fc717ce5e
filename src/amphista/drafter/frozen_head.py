"""The target's LM head over a draft vocabulary as training multiplies with it: cross-entropies, and back to states.

With r = soft p + text onehot(label), sum_v p_v = 1 and z less its largest entry, a row's loss is
|r| log sum_v e^z_v - sum_v r_v z_v, its gradient |r| q - r. Some rows at a time go from the product to the gradient of
the states: bfloat16 on a CPU in C (`native/training.py`), all else by passes over their logits in place.

Shapes: M rows, D hidden size, N draft vocabulary, P rows of target distributions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from amphista.kernels.shapes import even
from amphista.native import training as native

ROWS_IN_CACHE = 64  # whose logits over a draft vocabulary stay near the processor from one pass to the next
ROWS_IN_C = 512  # passes over a row stay near it in any case: enough for the product
ROWS_ON_GPU = 1 << 15  # nothing stays anywhere: as many as there are


class Aims(NamedTuple):
    """What rows aim at: distributions [P, N], which of them is each row's [M], the text's tokens or -1 [M]."""

    target_probs: Tensor
    rows: Tensor
    labels: Tensor


class FrozenHead:
    """The target's LM head over a draft vocabulary forwards, and back to states."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [N, D], bias [N]; products are in the weight's type."""
        self.dtype, self._weight, self._bias = weight.dtype, weight, bias
        self._in_c = native.reads(weight)
        self._rows = ROWS_ON_GPU if weight.is_cuda else ROWS_IN_C if self._in_c else ROWS_IN_CACHE

    def logits(self, states: Tensor) -> Tensor:
        """States [M, D] -> logits [M, N]; without gradient."""
        return functional.linear(states, self._weight, self._bias)

    def probabilities(self, states: Tensor) -> Tensor:
        """States [M, D] -> the target's distributions [M, N] in float32 or wider, some rows at a time."""
        wide = torch.promote_types(self.dtype, torch.float32)
        probs = torch.empty(len(states), len(self._weight), dtype=wide, device=states.device)
        for rows, out in zip(states.split(self._rows), probs.split(self._rows), strict=True):
            logits = self.logits(self._evened(rows))
            if self._in_c:
                native.softmax(logits[: len(rows)], out)
                continue
            out.copy_(logits).sub_(out.amax(-1, keepdim=True)).exp_()
            out.div_(out.sum(-1, keepdim=True))
        return probs

    def cross_entropies(
        self, states: Tensor, aims: Aims, weights: tuple[float, float], wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(summed loss, whether each row's best token is the text's [M], gradient of the states [M, D] if wanted).

        weights: of the target's distribution and of the text.
        """
        loss, rights, gradients = aims.target_probs.new_zeros(()), [], []
        parts = (x.split(self._rows) for x in (states, aims.rows, aims.labels))
        for rows, index, labels in zip(*parts, strict=True):
            logits = self.logits(self._evened(rows.to(self.dtype)))
            if self._in_c:
                of_rows = logits[: len(rows)]
                losses, right = native.cross_entropies(of_rows, aims.target_probs, index, labels, weights, wanted)
                gradient = logits
            else:
                losses, right, gradient = _by_passes(logits, Aims(aims.target_probs, index, labels), weights, wanted)
            loss = loss + losses.sum()
            rights.append(right)
            if wanted:
                gradients.append(self.gradient(gradient.to(self.dtype))[: len(rows)])
        return loss, torch.cat(rights), torch.cat(gradients).to(states.dtype) if wanted else None

    def _evened(self, states: Tensor) -> Tensor:
        """The same with rows of zeros behind, where shapes are compiled for."""
        return functional.pad(states, (0, 0, 0, even(len(states)) - len(states))) if self._in_c else states

    def gradient(self, upstream: Tensor) -> Tensor:
        """Gradient of the logits [M, N] -> gradient of the states [M, D]."""
        return upstream @ self._weight


def _by_passes(logits: Tensor, aims: Aims, weights: tuple[float, float], wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [M], best is the label [M], gradient [M, N]), all in the room of the widened logits."""
    soft, text = weights
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits.sub_(logits.amax(-1, keepdim=True))
    probs = aims.target_probs.index_select(0, aims.rows)
    index, known = aims.labels.clamp_min(0)[:, None], aims.labels >= 0
    of_label = logits.gather(-1, index).squeeze(-1)
    right = _is_best(logits, index, known & (of_label == 0))
    aligned = torch.linalg.vecdot(probs, logits)
    total = logits.exp_().sum(-1)
    of_text = text * known.to(logits.dtype)
    losses = (soft + of_text) * total.log() - soft * aligned - of_text * of_label
    if wanted:
        logits.mul_(((soft + of_text) / total)[:, None]).sub_(probs, alpha=soft)
        logits.scatter_add_(-1, index, -of_text[:, None])
    return losses, right, logits


def _is_best(logits: Tensor, index: Tensor, as_large: Tensor) -> Tensor:
    """Of rows whose label is as large as any, whether it is the first such token; bfloat16 logits often have equals."""
    rows = as_large.nonzero().squeeze(-1)
    best = torch.zeros_like(as_large)
    best[rows] = logits[rows].argmax(-1) == index[rows, 0]
    return best
