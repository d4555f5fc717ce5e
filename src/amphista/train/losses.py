"""The training loss, one head at a time (ALGORITHM section 3).

    L = lambda_1 * sum_k w_k CE(p_target(. | x_<=t+k), softmax(z_k))
      + lambda_2 * sum_k w_k CE(x_{t+1+k}, softmax(z_k))

The first term aligns with the target's distribution at the position the head predicts (arXiv 2406.13170 names the
term; its weight is open), the second with the text. Both run over the draft vocabulary: the target's distribution is
renormalised over it, and text tokens outside it count in the first term only.

A row q counts for head k iff x_{t+1} and x_{t+1+k} lie in the same answer. Rows of an answer are contiguous, so what
head k of row q aims at is row q + k of the same arrays.

Shapes: Q rows, K heads, D hidden size, N draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amphista.drafter.base import ParallelHeads
from amphista.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """`soft_weight` is lambda_1, `text_weight` lambda_2, w_k = `depth_decay`^(k-1); 1.0 is the paper's uniform."""

    soft_weight: float = 1.0
    text_weight: float = 0.1
    depth_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.soft_weight < 0 or self.text_weight < 0 or self.soft_weight + self.text_weight == 0:
            raise ConfigError("soft_weight and text_weight must not be negative, nor both 0")
        if not 0 < self.depth_decay <= 1:
            raise ConfigError(f"depth_decay is {self.depth_decay}: expected a number in (0, 1]")


@dataclass(frozen=True)
class AnswerRows:
    """The rows of a batch that lie in answers, flattened.

    rows: flat indices [Q] into the [B * T] hidden states. next_ids: x_{t+1} [Q]. answers: which answer [Q].
    """

    rows: Tensor
    next_ids: Tensor
    answers: Tensor

    def aims(self, head: int) -> Tensor:
        """Indices [M] of the rows that count for head `head` (0-based); each aims at index + head + 1."""
        ahead = head + 1
        if self.answers.numel() <= ahead:
            return self.answers.new_empty(0)
        return (self.answers[:-ahead] == self.answers[ahead:]).nonzero().squeeze(-1)


def head_loss(logits: Tensor, target_probs: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """Mean loss of one head: logits [M, N], target distribution [M, N], labels [M] in the draft vocabulary or -1."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    soft = -(target_probs * log_probs).sum(-1)
    inside = labels >= 0
    text = -log_probs.gather(-1, labels.clamp_min(0)[:, None]).squeeze(-1) * inside
    return (config.soft_weight * soft + config.text_weight * text).mean()


class HeadLoss(nn.Module):
    """Drafter and loss in one forward, which is what distributed wrappers need to see."""

    def __init__(self, drafter: ParallelHeads, config: LossConfig) -> None:
        super().__init__()
        self.drafter, self.config = drafter, config

    def forward(self, hidden: Tensor, next_ids: Tensor, answer_rows: AnswerRows) -> tuple[Tensor, Tensor]:
        """hidden [B, T, D], next_ids [B, T] -> (loss, the unweighted loss of each head [K])."""
        drafter = self.drafter
        states = drafter(hidden, next_ids, answer_rows.rows)
        with torch.no_grad():
            target_logits = drafter.target_logits(hidden.flatten(0, 1)[answer_rows.rows])
            target_probs = torch.softmax(target_logits.float(), dim=-1)
            labels = draft_labels(drafter, answer_rows.next_ids)
        total, weights, per_head = states.sum() * 0, 0.0, []  # answers of one token have a loss, too: 0
        for k in range(drafter.num_heads):
            index = answer_rows.aims(k)
            if index.numel() == 0:
                per_head.append(states.new_zeros(()))
                continue
            aim = index + k + 1
            loss = head_loss(drafter.head_logits(states[index, k], k), target_probs[aim], labels[aim], self.config)
            weight = self.config.depth_decay**k
            total, weights = total + weight * loss, weights + weight
            per_head.append(loss.detach())
        return total / max(weights, 1e-9), torch.stack(per_head)


def draft_labels(drafter: ParallelHeads, token_ids: Tensor) -> Tensor:
    """Token ids -> indices in the drafter's vocabulary, -1 outside it."""
    if drafter.draft_ids is None:
        return token_ids
    index = torch.searchsorted(drafter.draft_ids, token_ids).clamp_max(drafter.draft_vocab - 1)
    return torch.where(drafter.draft_ids[index] == token_ids, index, -1)
