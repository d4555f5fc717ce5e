"""What one forward of a target gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TargetOutput:
    """One forward: logits [N, V] (prefill: [1, V], the last row) and hidden states [N, D] of all rows.

    choices: the argmax of each row of logits, where the forward has brought them along. The tensors of a recorded
    forward (captured_forward.py) are valid until the next forward of the same target.
    """

    logits: Tensor
    hidden: Tensor
    choices: list[int] | None = None
