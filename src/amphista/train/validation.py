"""How good are the heads, and what tau would they give: measured on recorded answers, before any decoding.

A recorded answer is a walk the target really takes, so replaying it against the trees the heads would have grown gives
the tau of decoding that answer (exactly, up to rounding). Tau counts the tokens committed per target forward.

Of a drafter with a path correction, everything counts as it decodes: a head's ranks are those below the text's token at
the depth above.

Shapes: Q answer rows, K heads, R ranks, S shortlist, N draft vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from amphista.drafter.heads import ParallelHeads
from amphista.engine.loops import loop_free_length
from amphista.train.dataset import HiddenStates, PaddedBatch, batches_of
from amphista.train.head_loss import HeadLoss
from amphista.train.losses import LossConfig
from amphista.train.token_row import TokenRow
from amphista.tree.candidates import Candidates, ConditionalRanks
from amphista.tree.dynamic import best_first

NUM_RANKS = 10
ROWS_AT_ONCE = 64
TREE_SIZES = (4, 8, 16, 32, 64)
ACCEPTANCE_AT = 16


@dataclass(frozen=True)
class Validation:
    """Per-head accuracy at ranks 1..10 (cumulative), the loss, and tau by number of tree nodes.

    `tau_loop_free` counts each answer until it begins to loop; `acceptance[d - 1]` is the share of steps that accept at
    least d drafted tokens, with a tree of ACCEPTANCE_AT nodes.
    """

    loss: float
    head_loss: list[float]
    top: list[list[float]]
    tau: dict[int, float]
    tau_loop_free: dict[int, float]
    acceptance: list[float]
    num_positions: int

    def line(self) -> str:
        """One line for people."""
        first = " ".join(f"{ranks[0]:.3f}" for ranks in self.top)
        taus = " ".join(f"{size}:{value:.2f}" for size, value in self.tau.items())
        return f"loss {self.loss:.4f}  top-1 {first}  tau {taus}"


@torch.inference_mode()
def validate(
    drafter: ParallelHeads,
    rows: Sequence[TokenRow],
    hidden: HiddenStates,
    loss_config: LossConfig,
    *,
    batch_size: int = 8,
    tree_sizes: Sequence[int] = TREE_SIZES,
    temperature: float = 0.0,
) -> Validation:
    """Measure a drafter on held-out rows, its trees grown as for requests of this temperature.

    `num_positions` is the number of answer positions seen.
    """
    loss_of = HeadLoss(drafter, replace(loss_config, accept_until_fail=False))  # every head, everywhere
    device = drafter.device
    hits = torch.zeros(drafter.num_heads, NUM_RANKS)
    counts = torch.zeros(drafter.num_heads)
    losses = torch.zeros(drafter.num_heads)
    whole, loop_free = Walks(tree_sizes), Walks(tree_sizes)
    accepted: Counter[int] = Counter()
    for on_cpu in batches_of(rows, hidden, batch_size):
        batch = on_cpu.to(device)
        sums = loss_of(batch.hidden, batch.next_ids, batch.answer_rows)
        ranked = ranked_heads(drafter, batch, max(NUM_RANKS, max(*tree_sizes, ACCEPTANCE_AT) - 1), temperature)
        count_hits(ranked, batch, hits, counts)
        losses += sums.losses.cpu()
        for answer in replay_answers(ranked, batch):
            whole.add(answer, len(answer))
            loop_free.add(answer, answer.loop_free_length)
            accepted.update(answer.walk(ACCEPTANCE_AT, len(answer)))
    mean = losses / counts.clamp_min(1)
    weights = torch.tensor([loss_config.depth_decay**k for k in range(drafter.num_heads)])
    return Validation(
        loss=float((mean * weights).sum() / weights.sum()),
        head_loss=mean.tolist(),
        top=(hits / counts[:, None].clamp_min(1)).cumsum(1).tolist(),
        tau=whole.tau(),
        tau_loop_free=loop_free.tau(),
        acceptance=[_share_above(accepted, depth) for depth in range(drafter.num_heads)],
        num_positions=int(counts[0]),
    )


def _share_above(accepted: Counter[int], depth: int) -> float:
    """Share of steps that accept more than `depth` drafted tokens."""
    return sum(count for length, count in accepted.items() if length > depth) / max(accepted.total(), 1)


@dataclass(frozen=True)
class RankedHeads:
    """Top ranks of every head at every answer row: token ids and log-probabilities [Q, K, R], on CPU.

    Of a drafter with a path correction also `ConditionalRanks`, tensors [Q, K - 1, S, R]: ranks and log-probabilities.
    """

    tokens: Tensor
    log_probs: Tensor
    below: tuple[Tensor, Tensor] | None = None

    @property
    def num_ranks(self) -> int:
        return self.tokens.shape[-1]

    def candidates(self, row: int) -> Candidates:
        """What the drafter would offer at that row."""
        below = None if self.below is None else ConditionalRanks(*(values[row].tolist() for values in self.below))
        return Candidates(self.tokens[row].tolist(), self.log_probs[row].tolist(), below=below)

    def ranked_tokens(self, head: int, index: Tensor, above: Tensor) -> Tensor:
        """The tokens of some rows [M] as that head ranks them [M, R], below the tokens `above` [M]."""
        plain = self.tokens[index, head, :NUM_RANKS]
        if self.below is None or head == 0 or not index.numel():
            return plain
        ranks = self.below[0][index, head - 1]
        is_parent = self.tokens[index, head - 1, : ranks.shape[1]] == above[:, None]
        parent = is_parent.int().argmax(-1)
        best = ranks[torch.arange(len(index)), parent, :NUM_RANKS]
        given = torch.full_like(plain, -1)
        given[:, : best.shape[-1]] = self.tokens[index, head].gather(-1, best)
        return torch.where(is_parent.any(-1, keepdim=True), given, plain)


def ranked_heads(drafter: ParallelHeads, batch: PaddedBatch, num_ranks: int, temperature: float = 0.0) -> RankedHeads:
    """All heads of all answer rows, one head at a time so that Q x K x N never exists at once."""
    states = drafter(batch.hidden, batch.next_ids, batch.answer_rows.rows)
    divisors = torch.tensor(drafter.head_temperatures(temperature))
    num_ranks = num_ranks if drafter.path is None else max(num_ranks, drafter.config.path_shortlist)
    tokens, log_probs = [], []
    for k in range(drafter.num_heads):
        logits = exact_logits(drafter, states[:, k], k) / float(divisors[k])
        ids, values = drafter.top_ranks(logits, num_ranks)
        tokens.append(ids)
        log_probs.append(values)
    every_token, every_log_prob = torch.stack(tokens, 1), torch.stack(log_probs, 1)
    below = None
    if drafter.path is not None and drafter.num_heads > 1:
        below = _ranked_below(drafter, states, every_token, every_log_prob, divisors.to(states.device))
    return RankedHeads(every_token.cpu(), every_log_prob.cpu(), below)


def _ranked_below(
    drafter: ParallelHeads, states: Tensor, tokens: Tensor, log_probs: Tensor, divisors: Tensor
) -> tuple[Tensor, Tensor]:
    """`ConditionalRanks` at all rows, some at a time: for each of them there are K - 1 times S states. On CPU."""
    parts = []
    num_ranks = drafter.config.path_shortlist
    with torch.autocast(divisors.device.type, enabled=False):  # as `exact_logits`
        for start in range(0, len(states), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            some = states[rows].to(drafter.dtype), tokens[rows], log_probs[rows]
            parts.append([part.cpu() for part in drafter.ranks_below(*some, divisors, num_ranks)])
    ranks, log_probs = (torch.cat(column) for column in zip(*parts, strict=True))
    return ranks, log_probs


def exact_logits(drafter: ParallelHeads, states: Tensor, head: int) -> Tensor:
    """Float32 logits [M, N] of one head, whatever precision the states [M, D] were computed in.

    Bfloat16 logits of size 16 lie an eighth apart: ties would decide the ranks.
    """
    with torch.autocast(states.device.type, enabled=False):
        return drafter.head_logits(states.to(drafter.dtype), head).float()


def exact_logits_below(drafter: ParallelHeads, states: Tensor, head: int, above: Tensor) -> Tensor:
    """The same, given the tokens [M] above, of a head behind the first of a drafter with a path correction."""
    logits = exact_logits(drafter, states, head)
    if drafter.path is None or head == 0:
        return logits
    with torch.autocast(states.device.type, enabled=False):
        states = states.to(drafter.dtype)
        return drafter.given_above(logits, states, drafter.correction(states, above), drafter.own_weights(head))


def count_hits(ranked: RankedHeads, batch: PaddedBatch, hits: Tensor, counts: Tensor) -> None:
    """Add, per head and rank, how often that rank held the text's token."""
    next_ids = batch.answer_rows.next_ids.cpu()
    for k in range(ranked.tokens.shape[1]):
        index = batch.answer_rows.aims(k).cpu()
        wanted = next_ids[index + k + 1]
        offered = ranked.ranked_tokens(k, index, next_ids[index + k])
        hits[k] += (offered == wanted[:, None]).float().sum(0)
        counts[k] += index.numel()


class Walks:
    """Tokens and forwards of many answers, by tree size."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._tokens, self._forwards = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)

    def add(self, answer: AnswerReplay, length: int) -> None:
        """Count the first `length` tokens of an answer."""
        for size in self._tokens:
            accepted = answer.walk(size, length)
            self._tokens[size] += sum(accepted) + len(accepted)
            self._forwards[size] += len(accepted)

    def tau(self) -> dict[int, float]:
        """Tokens per forward by tree size."""
        return {size: tokens / max(self._forwards[size], 1) for size, tokens in self._tokens.items()}


class AnswerReplay:
    """One recorded answer and, at each of its rows, the nodes the heads would have grown."""

    def __init__(self, next_ids: list[int], ranked: RankedHeads, start: int) -> None:
        """start: the row of `ranked` that is the answer's first."""
        self._next_ids, self._ranked, self._start = next_ids, ranked, start
        self._reached: dict[int, list[int]] = {}  # row -> for each depth, the tree size that first reaches it

    def __len__(self) -> int:
        return len(self._next_ids)

    @cached_property
    def loop_free_length(self) -> int:
        """Tokens before the answer begins to loop."""
        return loop_free_length(self._next_ids)

    def walk(self, num_nodes: int, length: int) -> list[int]:
        """Decode the first `length` tokens with trees of `num_nodes`: drafted tokens accepted in each forward.

        The first token is the prefill's; a step that crosses the end counts up to it.
        """
        row, accepted = 0, []
        last = length - 1
        while row < last:
            reached = sum(size <= num_nodes for size in self._sizes_needed(row))
            accepted.append(min(reached, last - row - 1))
            row += accepted[-1] + 1
        return accepted

    def _sizes_needed(self, row: int) -> list[int]:
        """Best-first growth is nested: the smallest tree that holds the text's path to depth 1, 2, ..."""
        if row not in self._reached:
            candidates = self._ranked.candidates(self._start + row)
            largest = self._ranked.num_ranks + 1
            grown = best_first(self._next_ids[row], candidates, largest, candidates.num_heads)
            at = 0
            sizes: list[int] = []
            for node in range(1, len(grown.tokens)):
                ahead = row + len(sizes) + 1
                is_next = ahead < len(self._next_ids) and grown.parents[node] == at
                if is_next and grown.tokens[node] == self._next_ids[ahead]:
                    at = node
                    sizes.append(node + 1)
            self._reached[row] = sizes
        return self._reached[row]


def replay_answers(ranked: RankedHeads, batch: PaddedBatch) -> list[AnswerReplay]:
    """Split the rows of a batch into its answers."""
    answers = batch.answer_rows.answers.cpu()
    next_ids = batch.answer_rows.next_ids.tolist()
    bounds = [0, *((answers[1:] != answers[:-1]).nonzero().squeeze(-1) + 1).tolist(), len(next_ids)]
    replays = []
    for start, end in pairwise(bounds):
        if end - start > 1:
            replays.append(AnswerReplay(next_ids[start:end], ranked, start))
    return replays
