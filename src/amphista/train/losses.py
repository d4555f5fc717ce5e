"""The training losses, one head at a time (ALGORITHM section 3); every objective is one function with its source.

    L = sum_k w_k s_k mean_t l_{t,k} / sum_k w_k s_k
    l_{t,k} = a weighted sum of the objectives below, for p = p_target(. | x_<=t+k) and q = softmax(z_k)

w_k is the depth weight. s_k is the share of head k's positions that accept-until-fail leaves, 1 without it: a head
counts in proportion to what is left of it.

All run over the draft vocabulary: p is renormalised over it, and text tokens outside it have no cross-entropy with the
text. A row q counts for head k iff x_{t+1} and x_{t+1+k} lie in the same answer. Rows of an answer are contiguous, so
what head k of row q aims at is row q + k of the same arrays.

Positions x heads x vocabulary never exist at once, nor in what autograd keeps: each head's gradient is taken as soon as
its loss is there.

Shapes: Q rows, M rows that count for a head, K heads, D hidden size, N draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from amphista.drafter.base import ParallelHeads
from amphista.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the objectives (0 leaves one out) and which positions count, how much.

    `soft_weight` and `text_weight` are lambda_1 and lambda_2 of ALGORITHM section 3. `variation_weight`,
    `acceptance_weight` and `hybrid_weight` (with `hybrid_eta`) aim at sampled acceptance. `depth_decay` 1.0 is the
    paper's uniform.
    """

    soft_weight: float = 1.0
    text_weight: float = 0.1
    variation_weight: float = 0.0
    acceptance_weight: float = 0.0
    hybrid_weight: float = 0.0
    hybrid_eta: float = 3.0
    depth_decay: float = 1.0
    accept_until_fail: bool = False

    def __post_init__(self) -> None:
        if min(self.weights.values()) < 0 or sum(self.weights.values()) == 0:
            raise ConfigError(f"{', '.join(self.weights)} must not be negative, nor all 0")
        if self.hybrid_eta < 0:
            raise ConfigError(f"hybrid_eta is {self.hybrid_eta}: expected 0 or more (0 is plain KL)")
        if not 0 < self.depth_decay <= 1:
            raise ConfigError(f"depth_decay is {self.depth_decay}: expected a number in (0, 1]")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each objective by its field's name."""
        names = ("soft_weight", "text_weight", "variation_weight", "acceptance_weight", "hybrid_weight")
        return {name: getattr(self, name) for name in names}


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


# -- objectives: log_probs log q [M, N], target_probs p [M, N], labels [M] in the draft vocabulary or -1; each -> [M] --


def soft_cross_entropy(log_probs: Tensor, target_probs: Tensor) -> Tensor:
    """-sum_v p_v log q_v: align with the target's distribution (named in arXiv 2406.13170; its weight is open)."""
    return -(target_probs * log_probs).sum(-1)


def text_cross_entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """-log q(x_{t+1+k}): align with the text (arXiv 2401.10774, section 2.2.1); 0 outside the draft vocabulary."""
    return -log_probs.gather(-1, labels.clamp_min(0)[:, None]).squeeze(-1) * (labels >= 0)


def overlap(log_probs: Tensor, target_probs: Tensor) -> Tensor:
    """alpha = sum_v min(p_v, q_v): how often a token drawn from q survives rejection (arXiv 2211.17192)."""
    return torch.minimum(target_probs, log_probs.exp()).sum(-1)


def total_variation(log_probs: Tensor, target_probs: Tensor) -> Tensor:
    """1 - alpha = 1/2 sum_v |p_v - q_v| (arXiv 2602.23881): the acceptance itself; hardly a gradient far from p."""
    return 1 - overlap(log_probs, target_probs)


def negative_log_acceptance(log_probs: Tensor, target_probs: Tensor) -> Tensor:
    """-log alpha (arXiv 2602.23881, the likelihood form): total variation's gradient over alpha, so it starts well."""
    return -overlap(log_probs, target_probs).clamp_min(torch.finfo(log_probs.dtype).tiny).log()


def hybrid_acceptance(log_probs: Tensor, target_probs: Tensor, eta: float) -> Tensor:
    """b KL(p || q) + (1 - b) (1 - alpha), b = exp(-eta alpha) without gradient (arXiv 2602.23881, the hybrid form).

    KL far from p, total variation close to it; the source's best eta is 3.
    """
    blend = torch.exp(-eta * overlap(log_probs.detach(), target_probs))
    divergence = torch.xlogy(target_probs, target_probs).sum(-1) + soft_cross_entropy(log_probs, target_probs)
    return blend * divergence + (1 - blend) * total_variation(log_probs, target_probs)


# -- which positions count, how much ----------------------------------------------------------------------------------


def depth_weight(decay: float, head: int) -> float:
    """w_k = decay^(k-1) for head k = `head` + 1: deeper tokens need right ones before (arXiv 2401.10774, 2.2.1)."""
    return decay**head


def until_first_fail(counts: Tensor, index: Tensor, right: Tensor) -> Tensor:
    """m_{t,1} = 1, m_{t,k+1} = m_{t,k} [argmax z_{t,k} = x_{t+1+k}], without gradient (arXiv 2607.01893).

    counts: m_{t,k} [Q]. index: the rows [M] that head k was counted for. right: whether its best token was the text's
    [M]. At each position heads count up to and including the first wrong one: what is behind it is never accepted.
    """
    following = torch.zeros_like(counts)
    following[index] = right
    return following


# -- the loss ---------------------------------------------------------------------------------------------------------


def head_loss(logits: Tensor, target_probs: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """Mean loss of one head: logits [M, N], target distribution [M, N], labels [M] in the draft vocabulary or -1."""
    log_probs = torch.log_softmax(_widened(logits), dim=-1)
    objectives: dict[str, Callable[[], Tensor]] = {
        "soft_weight": lambda: soft_cross_entropy(log_probs, target_probs),
        "text_weight": lambda: text_cross_entropy(log_probs, labels),
        "variation_weight": lambda: total_variation(log_probs, target_probs),
        "acceptance_weight": lambda: negative_log_acceptance(log_probs, target_probs),
        "hybrid_weight": lambda: hybrid_acceptance(log_probs, target_probs, config.hybrid_eta),
    }
    terms = [weight * objectives[name]() for name, weight in config.weights.items() if weight]
    return torch.stack(terms).sum(0).mean()


def _widened(logits: Tensor) -> Tensor:
    """At least float32: half-precision logits have too few digits for a softmax over a vocabulary."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class HeadLoss(nn.Module):
    """Drafter and loss in one forward, which is what distributed wrappers need to see."""

    def __init__(self, drafter: ParallelHeads, config: LossConfig) -> None:
        super().__init__()
        self.drafter, self.config = drafter, config

    def forward(self, hidden: Tensor, next_ids: Tensor, answer_rows: AnswerRows) -> tuple[Tensor, Tensor]:
        """hidden [B, T, D], next_ids [B, T] -> (loss, the unweighted loss of each head over what counts for it [K])."""
        drafter, config = self.drafter, self.config
        states = drafter(hidden, next_ids, answer_rows.rows)
        with torch.no_grad():
            target_logits = drafter.target_logits(hidden.flatten(0, 1)[answer_rows.rows])
            target_probs = torch.softmax(_widened(target_logits), dim=-1)
            labels = draft_labels(drafter, answer_rows.next_ids)
        counts = torch.ones_like(labels, dtype=torch.bool)
        total, weights, per_head = states.sum() * 0, 0.0, []  # answers of one token have a loss, too: 0
        for k in range(drafter.num_heads):
            aims = answer_rows.aims(k)
            index = aims[counts[aims]]
            if index.numel() == 0:
                per_head.append(states.new_zeros(()))
                continue
            aim = index + k + 1
            scored = _Scored(drafter, target_probs, labels, aim, config)
            loss, right = scored(states[index, k], *drafter.own_weights(k))
            if config.accept_until_fail:
                counts = until_first_fail(counts, index, right)
            weight = depth_weight(config.depth_decay, k) * index.numel() / aims.numel()
            total, weights = total + weight * loss, weights + weight
            per_head.append(loss.detach())
        return total / max(weights, 1e-9), torch.stack(per_head)


@dataclass(frozen=True)
class _Scored:
    """One head's loss as a function of its states [M, D] and its own LM head, if it has one."""

    drafter: ParallelHeads
    target_probs: Tensor
    labels: Tensor
    aim: Tensor
    config: LossConfig

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(mean loss, whether each row's best token is the text's [M])."""
        if not torch.is_grad_enabled():
            return self.compute(*inputs)
        loss, right = _GradientAtOnce.apply(self.compute, *inputs)
        return loss, right

    def compute(self, states: Tensor, *own: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.drafter.score(states, own)
        labels = self.labels[self.aim]
        loss = head_loss(logits, self.target_probs[self.aim], labels, self.config)
        return loss, logits.detach().argmax(-1) == labels


class _GradientAtOnce(torch.autograd.Function):
    """Differentiate a scalar function in the forward pass: its logits [M, N] are freed before the next head's exist.

    Autograd would keep them, and the softmax of them, for all heads until the backward pass. The work is the same.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
            loss, right = function(*leaves)
            leaving = [leaf for leaf in leaves if leaf.requires_grad]
            gradients = iter(torch.autograd.grad(loss, leaving) if leaving else ())
        ctx.save_for_backward(*(next(gradients) if want else None for want in wanted))
        ctx.mark_non_differentiable(right)
        return loss.detach(), right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if gradient is None else gradient * upstream for gradient in ctx.saved_tensors)


def draft_labels(drafter: ParallelHeads, token_ids: Tensor) -> Tensor:
    """Token ids -> indices in the drafter's vocabulary, -1 outside it."""
    if drafter.draft_ids is None:
        return token_ids
    index = torch.searchsorted(drafter.draft_ids, token_ids).clamp_max(drafter.draft_vocab - 1)
    return torch.where(drafter.draft_ids[index] == token_ids, index, -1)
