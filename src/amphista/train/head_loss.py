"""The training loss: which positions count for which head, and how it is computed with no product that nobody reads.

    L = sum_k w_k s_k mean_t l_{t,k} / sum_k w_k s_k

w_k is the depth weight. s_k is the share of head k's positions that accept-until-fail leaves, 1 without it: a head
counts in proportion to what is left of it. l_{t,k}: losses.py. Of a drafter with a path correction, l is shared between
what the head says alone and what the heads behind the first say given the token above theirs (`path_share`); above head
k that is the text's x_{t+k}: nothing is accepted below any other.

A row counts for head k iff x_{t+1} and x_{t+1+k} lie in the same answer. Rows of an answer are contiguous, so what head
k of row q aims at is row q + k of the same arrays.

Heads are asked one after the other, each only for the rows that count for it: behind a wrong head nothing is computed,
not even its state. Positions x heads x vocabulary never exist at once, nor in what autograd keeps: `chunk_rows` rows of
one head do, and their gradient is taken as soon as their loss is there.

Shapes: Q rows, M rows that count for a head, K heads, D hidden size, N draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from amphista.drafter.frozen_head import Aims, FrozenHead
from amphista.drafter.heads import ParallelHeads, with_paths
from amphista.drafter.scoring import ScoringDrafter, StateOf
from amphista.kernels.shapes import evened
from amphista.train.losses import LossConfig, depth_weight, head_losses, state_distance, widened

# Of one head and chunk, 64 MB in float32 (on a GPU 1 GB): more rows at once cost less each.
LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 28}
FEWEST_ROWS = 128


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


def until_first_fail(counts: Tensor, index: Tensor, right: Tensor) -> Tensor:
    """m_{t,1} = 1, m_{t,k+1} = m_{t,k} [argmax z_{t,k} = x_{t+1+k}], without gradient (arXiv 2607.01893).

    counts: m_{t,k} [Q]. index: the rows [M] that head k was counted for. right: whether its best token was the text's
    [M]. At each position heads count up to and including the first wrong one: what is behind it is never accepted.
    """
    following = torch.zeros_like(counts)
    following[index] = right
    return following


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
    """Drafter and loss in one forward, which is what distributed wrappers need to see.

    one_by_one: ask heads only for the rows that count. Not where weights are sharded: all processes would have to ask
    for the same.
    """

    def __init__(self, drafter: ScoringDrafter, config: LossConfig, *, one_by_one: bool = True) -> None:
        super().__init__()
        self.drafter, self.config, self.one_by_one = drafter, config, one_by_one
        at_once = LOGITS_AT_ONCE.get(drafter.device.type, LOGITS_AT_ONCE["cpu"])
        self.chunk_rows = config.chunk_rows or max(FEWEST_ROWS, at_once // drafter.draft_vocab)

    def forward(self, hidden: Tensor, next_ids: Tensor, answer_rows: AnswerRows) -> HeadSums:
        """hidden [B, T, W], next_ids [B, T] -> what this batch adds to each head's loss."""
        labels = draft_labels(self.drafter, answer_rows.next_ids)
        aimed_at = hidden.flatten(0, 1)[:, : self.drafter.spec.hidden_size].index_select(0, answer_rows.rows)
        state_of = self._states(hidden, next_ids, answer_rows.rows)
        parts = [
            self._part(
                state_of(slice(start, start + self.chunk_rows)),
                _Part(self.drafter, aimed_at, labels, slice(start, start + self.chunk_rows), self.config),
                answer_rows,
            )
            for start in range(0, max(len(labels), 1), self.chunk_rows)
        ]
        losses, counted = (torch.stack(column).sum(0) for column in zip(*parts, strict=True))
        aims = counted.new_tensor([answer_rows.aims(k).numel() for k in range(self.drafter.num_heads)])
        if self.drafter.path is not None:
            losses = losses + self.drafter.path.nothing()
        return HeadSums(losses, counted, aims)

    def _states(self, hidden: Tensor, next_ids: Tensor, rows: Tensor) -> Callable[[slice], StateOf]:
        """For a slice of the answer rows, the heads' states of some of its rows."""
        if self.one_by_one:
            return self.drafter.states_of(hidden, next_ids, evened(rows))
        states = self.drafter(hidden, next_ids, rows)
        return lambda some: lambda head, index: states[some][index, head]

    def _part(self, state: StateOf, part: _Part, answer_rows: AnswerRows) -> tuple[Tensor, Tensor]:
        """(summed losses [K], rows that counted [K]) of one chunk of rows, which `state` counts from its start."""
        counts = torch.ones_like(part.labels, dtype=torch.bool)
        losses, counted, asked = [], [], answer_rows.rows.new_zeros(1)
        corrected = with_paths(self.drafter)
        for k in range(self.drafter.num_heads):
            index = answer_rows.aims(k)
            index = index[(index >= part.chunk.start) & (index < part.chunk.stop)]
            index = index[counts[index]]
            counted.append(float(index.numel()))
            own = self.drafter.own_weights(k)
            if index.numel() == 0:  # a gradient of nothing: every weight has one, as distributed wrappers expect
                nothing = state(k, asked[:1]).sum() * 0
                losses.append(widened(sum((weight.flatten()[0] * 0 for weight in own), nothing)))
                continue
            asked = index - part.chunk.start
            states = state(k, evened(asked))[: len(asked)]
            above: tuple[Tensor, ...] = ()
            if k and corrected is not None:
                above = (corrected.correction(states, answer_rows.next_ids[index + k]),)
            loss, right = part.scored(k, index, states, *above, *own)
            if self.config.feature_weight:
                distance = state_distance(states, part.aimed_at.index_select(0, index + k + 1))
                loss = loss + self.config.feature_weight * distance.sum()
            if self.config.accept_until_fail:
                counts = until_first_fail(counts, index, right)
            losses.append(loss)
        return torch.stack(losses), losses[0].new_tensor(counted)


@dataclass(frozen=True)
class _Part:
    """A chunk of rows, and what their heads aim at."""

    drafter: ScoringDrafter
    aimed_at: Tensor
    labels: Tensor
    chunk: slice
    config: LossConfig

    @property
    def corrected(self) -> ParallelHeads | None:
        """The drafter, where it has a path correction."""
        return with_paths(self.drafter)

    @cached_property
    def target_probs(self) -> Tensor:
        """The target's distribution from the chunk's second row on: nobody aims at its first."""
        aimed_at = self.aimed_at[self.chunk.start + 1 : self.chunk.stop + self.drafter.num_heads]
        with torch.no_grad():
            if self.frozen_head is None:
                return torch.softmax(widened(self.drafter.target_logits(aimed_at)), dim=-1)
            return self.frozen_head.probabilities(aimed_at.to(self.frozen_head.dtype))

    @cached_property
    def frozen_head(self) -> FrozenHead | None:
        """The shared LM head for `_FrozenLosses`, where that knows its form and the objectives."""
        return None if self.config.aims_at_acceptance else self.drafter.frozen_head()

    @property
    def path_share(self) -> float:
        """1 where nothing is trained but the correction, or where nothing is trained."""
        trains_heads = self.corrected is not None and self.corrected.trains_heads
        return self.config.path_share if torch.is_grad_enabled() and trains_heads else 1.0

    def scored(self, head: int, index: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(summed loss of a head's rows, whether each row's best token is the text's, as far as anybody asks)."""
        aim = index + head + 1
        labels, aim = self.labels[aim], aim - self.chunk.start - 1
        corrected = self.corrected if head else None
        num_corrections = 0 if corrected is None else 1
        frozen = self.frozen_head
        if frozen is not None and not num_corrections:
            weights = self.config.soft_weight, self.config.text_weight
            loss, right = _FrozenLosses.apply(inputs[0], frozen, Aims(self.target_probs, aim, labels), weights)
            return loss, right
        target_probs = self.target_probs[aim]

        def compute(states: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
            own = others[num_corrections:]
            logits = self.drafter.score(states, own)
            forms = [(1.0, logits)]
            if corrected is not None:
                logits = corrected.given_above(logits, states, others[0], own)
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


class _FrozenLosses(torch.autograd.Function):
    """Both cross-entropies of rows under a frozen LM head, summed, and whether each row's best token is the text's.

    Equal to `head_losses` of the head's logits (a law); `FrozenHead.cross_entropies` has the gradient at once.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: FrozenHead, aims: Aims, weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(states.device.type, enabled=False):  # which would sum in bfloat16
            loss, right, gradient = head.cross_entropies(states, aims, weights, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def draft_labels(drafter: ScoringDrafter, token_ids: Tensor) -> Tensor:
    """Token ids -> indices in the drafter's vocabulary, -1 outside it."""
    if drafter.draft_ids is None:
        return token_ids
    index = torch.searchsorted(drafter.draft_ids, token_ids).clamp_max(drafter.draft_vocab - 1)
    return torch.where(drafter.draft_ids[index] == token_ids, index, -1)
