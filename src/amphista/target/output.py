"""What one forward of a target gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TargetOutput:
    """One forward: logits [N, V] (prefill: [1, V], the last row; none [0, V] where choices are enough) and hidden
    states of all rows, behind them the taps that were asked for [N, (1 + taps) * D].

    choices: the argmax of each row of logits, -1 where they are no finite numbers, where the forward has brought them
    along; the C step's are taken before a family caps its logits, which may make equals of the largest. The tensors of
    a recorded forward (captured_forward.py) are valid until the next forward of the same target.
    """

    logits: Tensor
    hidden: Tensor
    choices: list[int] | None = None

    def distance(self, other: TargetOutput) -> float:
        """How far logits and hidden states are from another's, by its largest; NaN where one is."""
        parts = ((self.logits, other.logits), (self.hidden, other.hidden))
        return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in parts]).max())


def choices_of(logits: Tensor) -> Tensor:
    """The argmax of each row [N, V], -1 where it is infinite or there is a NaN."""
    best = logits.max(-1)
    return torch.where(best.values.abs() < math.inf, best.indices, -1)
