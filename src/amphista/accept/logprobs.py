"""Log-probabilities of chosen tokens, by the target's raw logits: what it thought of them before any setting.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of an output token, and of the best tokens at its place, best first."""

    token_id: int
    logprob: float
    top: dict[int, float]


def token_logprobs(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Of `tokens`, chosen at the rows of `logits` [T, V]; with the best `num_top` of each row."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    chosen = log_probs[torch.arange(len(tokens), device=logits.device), list(tokens)].tolist()
    best = log_probs.topk(num_top, dim=-1)
    tops = [dict(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [TokenLogprob(*row) for row in zip(tokens, chosen, tops, strict=True)]
