"""The objectives of training (ALGORITHM section 3), each one function with its source, and their weights.

l_{t,k} = a weighted sum of the objectives below, for p = p_target(. | x_<=t+k) and q = softmax(z_k)

All run over the draft vocabulary: p is renormalised over it, and text tokens outside it have no cross-entropy with the
text. What is done with l_{t,k}: head_loss.py.

Shapes: M rows that count for a head, N draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from amphista.errors import ConfigError

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


def state_distance(states: Tensor, target_states: Tensor) -> Tensor:
    """Smooth L1 of head states [M, D] to the target's own there, h_{t+k}, a mean over D -> [M] (arXiv 2401.15077)."""
    return functional.smooth_l1_loss(widened(states), widened(target_states), reduction="none").mean(-1)


# -- which positions count, how much ----------------------------------------------------------------------------------


def depth_weight(decay: float, head: int) -> float:
    """w_k = decay^(k-1) for head k = `head` + 1: deeper tokens need right ones before (arXiv 2401.10774, 2.2.1)."""
    return decay**head


# -- which objectives, with which weight ------------------------------------------------------------------------------

CROSS_ENTROPIES = ("soft_weight", "text_weight")  # these two alone have a shorter way: `_CrossEntropies`


class Scored(NamedTuple):
    """What an objective may look at: log q [M, N], p [M, N], labels [M] in the draft vocabulary or -1, the settings."""

    log_probs: Tensor
    target_probs: Tensor
    labels: Tensor
    config: LossConfig


Objective = Callable[[Scored], Tensor]


def weighs(objective: Objective, default: float = 0.0) -> Any:
    """A field of `LossConfig` that holds the weight of an objective."""
    return field(default=default, metadata={"objective": objective})


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the objectives (0 leaves one out) and which positions count, how much.

    A new objective is one function above and one line here. `soft_weight` and `text_weight` are lambda_1 and lambda_2
    of ALGORITHM section 3; the next three (`hybrid_eta` belongs to the last) aim at sampled acceptance.
    `feature_weight`: of `state_distance`, which looks at no token. `depth_decay` 1.0 is the paper's uniform.
    `path_share`: how much of a head's loss is that given the token above (drafters with a path correction, heads behind
    the first); all of it where the heads are frozen. `chunk_rows` bounds memory, not the loss: no more rows meet the
    vocabulary at once; 0: as many as give some 16 million logits.
    """

    soft_weight: float = weighs(lambda at: soft_cross_entropy(at.log_probs, at.target_probs), 1.0)
    text_weight: float = weighs(lambda at: text_cross_entropy(at.log_probs, at.labels), 0.1)
    variation_weight: float = weighs(lambda at: total_variation(at.log_probs, at.target_probs))
    acceptance_weight: float = weighs(lambda at: negative_log_acceptance(at.log_probs, at.target_probs))
    hybrid_weight: float = weighs(lambda at: hybrid_acceptance(at.log_probs, at.target_probs, at.config.hybrid_eta))
    hybrid_eta: float = 3.0
    feature_weight: float = 0.0
    depth_decay: float = 1.0
    accept_until_fail: bool = False
    path_share: float = 0.5
    chunk_rows: int = 0

    def __post_init__(self) -> None:
        if self.feature_weight < 0:
            raise ConfigError(f"feature_weight is {self.feature_weight}: expected 0 or more")
        if min(self.weights.values()) < 0 or sum(self.weights.values()) == 0:
            raise ConfigError(f"{', '.join(self.weights)} must not be negative, nor all 0")
        if self.hybrid_eta < 0:
            raise ConfigError(f"hybrid_eta is {self.hybrid_eta}: expected 0 or more (0 is plain KL)")
        if self.chunk_rows < 0:
            raise ConfigError(f"chunk_rows is {self.chunk_rows}: expected 0 or more")
        if not 0 < self.path_share <= 1:
            raise ConfigError(f"path_share is {self.path_share}: expected a number in (0, 1]")
        if not 0 < self.depth_decay <= 1:
            raise ConfigError(f"depth_decay is {self.depth_decay}: expected a number in (0, 1]")

    @property
    def aims_at_acceptance(self) -> bool:
        """Whether anything but the two cross-entropies is asked for."""
        return any(weight for name, weight in self.weights.items() if name not in CROSS_ENTROPIES)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each objective by its field's name."""
        return {name: getattr(self, name) for name in objectives()}


def objectives() -> dict[str, Objective]:
    """Every objective by the name of its weight."""
    return {f.name: f.metadata["objective"] for f in fields(LossConfig) if "objective" in f.metadata}


# -- the loss ---------------------------------------------------------------------------------------------------------


def head_losses(logits: Tensor, target_probs: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """Loss [M] of one head's rows: logits [M, N], target distribution [M, N], labels [M] in the vocabulary or -1."""
    if not config.aims_at_acceptance:
        both: Tensor = _CrossEntropies.apply(
            widened(logits), target_probs, labels, config.soft_weight, config.text_weight
        )
        return both
    log_probs = torch.log_softmax(widened(logits), dim=-1)
    scored = Scored(log_probs, target_probs, labels, config)
    terms = [weight * objectives()[name](scored) for name, weight in config.weights.items() if weight]
    return torch.stack(terms).sum(0)


class _CrossEntropies(torch.autograd.Function):
    """Both cross-entropies as one, with r = soft p + text onehot(label): -sum_v r_v log q_v and its gradient |r| q - r.

    Equal to the weighted sum of `soft_cross_entropy` and `text_cross_entropy` (a law), in half the passes over [M, N].
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_probs: Tensor, labels: Tensor, soft: float, text: float) -> Tensor:
        log_probs = torch.log_softmax(logits, dim=-1)
        known = (labels >= 0).to(logits.dtype)
        index = labels.clamp_min(0)[:, None]
        with torch.autocast(logits.device.type, enabled=False):  # which would sum in bfloat16
            loss: Tensor = -soft * torch.linalg.vecdot(target_probs, log_probs)
        loss -= text * known * log_probs.gather(-1, index).squeeze(-1)
        ctx.save_for_backward(log_probs, target_probs, index, text * known)
        ctx.soft = soft
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        log_probs, target_probs, index, text = ctx.saved_tensors
        gradient = log_probs.exp().mul_((ctx.soft + text)[:, None])
        gradient.sub_(target_probs, alpha=ctx.soft)
        gradient.scatter_add_(-1, index, -text[:, None])
        return gradient.mul_(upstream[:, None]), None, None, None, None


def widened(logits: Tensor) -> Tensor:
    """At least float32: half-precision logits have too few digits for a softmax over a vocabulary."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
