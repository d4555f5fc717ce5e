"""The training losses, one head at a time (ALGORITHM section 3); every objective is one function with its source.

    L = sum_k w_k s_k mean_t l_{t,k} / sum_k w_k s_k
    l_{t,k} = a weighted sum of the objectives below, for p = p_target(. | x_<=t+k) and q = softmax(z_k)

q is what the head says alone; of a drafter with a path correction, l is shared between that and what the heads behind
the first say given the token above theirs (`path_share`). Above head k that is the text's x_{t+k}: nothing is accepted
below any other.

w_k is the depth weight. s_k is the share of head k's positions that accept-until-fail leaves, 1 without it: a head
counts in proportion to what is left of it.

All run over the draft vocabulary: p is renormalised over it, and text tokens outside it have no cross-entropy with the
text. A row q counts for head k iff x_{t+1} and x_{t+1+k} lie in the same answer. Rows of an answer are contiguous, so
what head k of row q aims at is row q + k of the same arrays.

Positions x heads x vocabulary never exist at once, nor in what autograd keeps: `chunk_rows` rows of one head do, and
their gradient is taken as soon as their loss is there. (Small blocks are faster, too: past 32 MB each is mapped anew.)

Shapes: Q rows, M rows that count for a head, K heads, D hidden size, N draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from amphista.drafter.heads import ParallelHeads
from amphista.errors import ConfigError


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
    of ALGORITHM section 3; the next three (`hybrid_eta` belongs to the last) aim at sampled acceptance. `depth_decay`
    1.0 is the paper's uniform. `path_share`: how much of a head's loss is that given the token above (drafters with a
    path correction, heads behind the first); all of it where the heads are frozen. `chunk_rows` bounds memory, not the
    loss: no more rows meet the vocabulary at once.
    """

    soft_weight: float = weighs(lambda at: soft_cross_entropy(at.log_probs, at.target_probs), 1.0)
    text_weight: float = weighs(lambda at: text_cross_entropy(at.log_probs, at.labels), 0.1)
    variation_weight: float = weighs(lambda at: total_variation(at.log_probs, at.target_probs))
    acceptance_weight: float = weighs(lambda at: negative_log_acceptance(at.log_probs, at.target_probs))
    hybrid_weight: float = weighs(lambda at: hybrid_acceptance(at.log_probs, at.target_probs, at.config.hybrid_eta))
    hybrid_eta: float = 3.0
    depth_decay: float = 1.0
    accept_until_fail: bool = False
    path_share: float = 0.5
    chunk_rows: int = 512

    def __post_init__(self) -> None:
        if min(self.weights.values()) < 0 or sum(self.weights.values()) == 0:
            raise ConfigError(f"{', '.join(self.weights)} must not be negative, nor all 0")
        if self.hybrid_eta < 0:
            raise ConfigError(f"hybrid_eta is {self.hybrid_eta}: expected 0 or more (0 is plain KL)")
        if self.chunk_rows < 1:
            raise ConfigError(f"chunk_rows is {self.chunk_rows}: expected at least 1")
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
            _widened(logits), target_probs, labels, config.soft_weight, config.text_weight
        )
        return both
    log_probs = torch.log_softmax(_widened(logits), dim=-1)
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


def _widened(logits: Tensor) -> Tensor:
    """At least float32: half-precision logits have too few digits for a softmax over a vocabulary."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class HeadSums(NamedTuple):
    """What a batch adds to the loss, per head [K]: summed losses, rows that counted, rows it had (equal without fails).

    Sums of parts of a batch add up, whichever process or micro-batch they come from; means would not.
    """

    losses: Tensor
    counted: Tensor
    aims: Tensor

    def loss(self, config: LossConfig) -> Tensor:
        """The loss of the module's first equation."""
        return self.weighted(self.aims, config) / self.weight(self.aims, config)

    def weighted(self, aims: Tensor, config: LossConfig) -> Tensor:
        """sum_k w_k s_k mean_t l_{t,k}, as the part of these rows among `aims` [K] rows in all."""
        part: Tensor = (_depth_weights(config, aims) * self.losses / aims.clamp_min(1)).sum()
        return part

    def weight(self, aims: Tensor, config: LossConfig) -> Tensor:
        """sum_k w_k s_k, as the part of these rows among `aims` [K] rows in all."""
        return (_depth_weights(config, aims) * self.counted / aims.clamp_min(1)).sum().clamp_min(1e-9)

    def per_head(self) -> Tensor:
        """The unweighted loss of each head over what counts for it [K]."""
        return self.losses.detach() / self.counted.clamp_min(1)


def _depth_weights(config: LossConfig, like: Tensor) -> Tensor:
    return like.new_tensor([depth_weight(config.depth_decay, k) for k in range(len(like))])


class HeadLoss(nn.Module):
    """Drafter and loss in one forward, which is what distributed wrappers need to see."""

    def __init__(self, drafter: ParallelHeads, config: LossConfig) -> None:
        super().__init__()
        self.drafter, self.config = drafter, config

    def forward(self, hidden: Tensor, next_ids: Tensor, answer_rows: AnswerRows) -> HeadSums:
        """hidden [B, T, D], next_ids [B, T] -> what this batch adds to each head's loss."""
        states = self.drafter(hidden, next_ids, answer_rows.rows)
        labels = draft_labels(self.drafter, answer_rows.next_ids)
        aimed_at = hidden.flatten(0, 1)[answer_rows.rows]
        parts = [
            self._part(states, _Part(self.drafter, aimed_at, labels, start, self.config), answer_rows)
            for start in range(0, max(len(labels), 1), self.config.chunk_rows)
        ]
        losses, counted = (torch.stack(column).sum(0) for column in zip(*parts, strict=True))
        aims = counted.new_tensor([answer_rows.aims(k).numel() for k in range(self.drafter.num_heads)])
        nothing = states.sum() * 0  # answers of one token have a loss, too: 0
        if self.drafter.path is not None:
            nothing = nothing + self.drafter.path.nothing()
        return HeadSums(losses + nothing, counted, aims)

    def _part(self, states: Tensor, part: _Part, answer_rows: AnswerRows) -> tuple[Tensor, Tensor]:
        """(summed losses [K], rows that counted [K]) of one chunk of rows."""
        counts = torch.ones_like(part.labels, dtype=torch.bool)
        losses, counted = [], []
        for k in range(self.drafter.num_heads):
            index = answer_rows.aims(k)
            index = index[(index >= part.start) & (index < part.start + self.config.chunk_rows)]
            index = index[counts[index]]
            counted.append(float(index.numel()))
            own = self.drafter.own_weights(k)
            if index.numel() == 0:  # a gradient of nothing: distributed wrappers wait for one of every weight
                losses.append(_widened(sum((weight.flatten()[0] * 0 for weight in own), states.new_zeros(()))))
                continue
            above: tuple[Tensor, ...] = ()
            if k and self.drafter.path is not None:
                above = (self.drafter.correction(states[index, k], answer_rows.next_ids[index + k]),)
            loss, right = part.scored(k, index, states[index, k], *above, *own)
            if self.config.accept_until_fail:
                counts = until_first_fail(counts, index, right)
            losses.append(loss)
        return torch.stack(losses), losses[0].new_tensor(counted)


@dataclass(frozen=True)
class _Part:
    """The rows from `start` on, `chunk_rows` of them, and what their heads aim at."""

    drafter: ParallelHeads
    aimed_at: Tensor
    labels: Tensor
    start: int
    config: LossConfig

    @cached_property
    def target_probs(self) -> Tensor:
        """The target's distribution over the draft vocabulary from row start + 1 on; row `start` is nobody's aim."""
        last = self.start + self.config.chunk_rows + self.drafter.num_heads
        with torch.no_grad():
            return torch.softmax(_widened(self.drafter.target_logits(self.aimed_at[self.start + 1 : last])), dim=-1)

    @property
    def path_share(self) -> float:
        """1 where nothing is trained but the correction, or where nothing is trained."""
        return self.config.path_share if torch.is_grad_enabled() and self.drafter.trains_heads else 1.0

    def scored(self, head: int, index: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(summed loss of a head's rows, whether each row's best token is the text's, as far as anybody asks)."""
        aim = index + head + 1
        labels, target_probs = self.labels[aim], self.target_probs[aim - self.start - 1]
        num_corrections = 1 if head and self.drafter.path is not None else 0

        def compute(states: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
            own = others[num_corrections:]
            logits = self.drafter.score(states, own)
            forms = [(1.0, logits)]
            if num_corrections:
                logits = self.drafter.given_above(logits, states, others[0], own)
                forms = [(1 - self.path_share, forms[0][1]), (self.path_share, logits)]
            losses = [w * head_losses(form, target_probs, labels, self.config).sum() for w, form in forms if w]
            asked = self.config.accept_until_fail
            right = logits.detach().argmax(-1) == labels if asked else torch.empty(0, device=labels.device)
            return torch.stack(losses).sum(), right

        return _at_once(compute, *inputs)


def _at_once(function: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():
        return function(*inputs)
    loss, right = _GradientAtOnce.apply(function, *inputs)
    return loss, right


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
