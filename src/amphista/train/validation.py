"""How good are the heads, and what tau would they give: measured on recorded answers, before any decoding.

A recorded answer is a walk the target really takes, so replaying it against the trees the heads would have grown gives
the tau of decoding that answer (exactly, up to rounding). Tau counts the tokens committed per target forward.

Of a drafter with a path correction, or one that is asked in rounds, a head's ranks are those below the text's token at
the depth above. What the latter would say below other tokens is not asked: its tau is that of the best static trees,
fitted to these answers, where other drafters' is that of dynamic trees.

Shapes: Q answer rows, K heads, R ranks, S shortlist, N draft vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from amphista.drafter.heads import ParallelHeads, with_paths
from amphista.drafter.scoring import ScoringDrafter
from amphista.train.dataset import HiddenStates, PaddedBatch, batches_of
from amphista.train.head_loss import HeadLoss
from amphista.train.losses import LossConfig
from amphista.train.replay import AnswerReplay, NestedTemplates, Walks, answers_in, sizes_of_best_tree
from amphista.train.token_row import TokenRow
from amphista.tree.candidates import Candidates, ConditionalRanks

NUM_RANKS = 10
ROWS_AT_ONCE = 64
TREE_SIZES = (4, 8, 16, 32, 64)
ACCEPTANCE_AT = 16


@dataclass(frozen=True)
class Validation:
    """Per-head accuracy at ranks 1..10 (cumulative), the loss, and tau by number of tree nodes.

    `trees`: dynamic, or static ones fitted to these rows. `tau_loop_free` counts each answer until it begins to loop;
    `acceptance[d - 1]` is the share of steps that accept at least d drafted tokens, with a tree of ACCEPTANCE_AT nodes.
    """

    loss: float
    head_loss: list[float]
    top: list[list[float]]
    tau: dict[int, float]
    tau_loop_free: dict[int, float]
    acceptance: list[float]
    num_positions: int
    trees: Literal["dynamic", "static"] = "dynamic"

    def line(self) -> str:
        """One line for people."""
        first = " ".join(f"{ranks[0]:.3f}" for ranks in self.top)
        taus = " ".join(f"{size}:{value:.2f}" for size, value in self.tau.items())
        return f"loss {self.loss:.4f}  top-1 {first}  tau {taus}"


@torch.inference_mode()
def validate(
    drafter: ScoringDrafter,
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
    replays = Replays(drafter, max(*tree_sizes, ACCEPTANCE_AT))
    whole, loop_free = Walks(tree_sizes), Walks(tree_sizes)
    accepted: Counter[int] = Counter()

    def add(answer: AnswerReplay) -> None:
        whole.add(answer, len(answer))
        loop_free.add(answer, answer.loop_free_length)
        accepted.update(answer.walk(ACCEPTANCE_AT, len(answer)))

    for on_cpu in batches_of(rows, hidden, batch_size):
        batch = on_cpu.to(device)
        sums = loss_of(batch.hidden, batch.next_ids, batch.answer_rows)
        ranked = ranked_heads(drafter, batch, replays.num_ranks, temperature)
        count_hits(ranked, batch, hits, counts)
        losses += sums.losses.cpu()
        for answer in replays.of(ranked, batch):
            add(answer)
    for answer in replays.left(hits / counts[:, None].clamp_min(1)):
        add(answer)
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
        trees="static" if drafter.heads_a_round < drafter.num_heads else "dynamic",
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
        below = None
        if self.below is not None:
            ranks, log_probs = self.below
            below = ConditionalRanks(ranks[row].tolist(), log_probs[row].tolist())
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

    def text_ranks(self, batch: PaddedBatch) -> list[list[int]]:
        """The rank [Q, K] of the text's token at each depth, -1 where it has none or the answer has ended."""
        next_ids = batch.answer_rows.next_ids.cpu()
        ranks = torch.full(self.tokens.shape[:2], -1)
        for k in range(self.tokens.shape[1]):
            index = batch.answer_rows.aims(k).cpu()
            is_text = self.tokens[index, k] == next_ids[index + k + 1][:, None]
            ranks[index, k] = torch.where(is_text.any(-1), is_text.int().argmax(-1), -1)
        return ranks.tolist()


def ranked_heads(drafter: ScoringDrafter, batch: PaddedBatch, num_ranks: int, temperature: float = 0.0) -> RankedHeads:
    """All heads of all answer rows, one head at a time so that Q x K x N never exists at once."""
    states = drafter(batch.hidden, batch.next_ids, batch.answer_rows.rows)
    divisors = torch.tensor(drafter.head_temperatures(temperature))
    corrected = with_paths(drafter)
    num_ranks = num_ranks if corrected is None else max(num_ranks, corrected.config.path_shortlist)
    tokens, log_probs = [], []
    for k in range(drafter.num_heads):
        logits = exact_logits(drafter, states[:, k], k) / float(divisors[k])
        ids, values = drafter.top_ranks(logits, num_ranks)
        tokens.append(ids)
        log_probs.append(values)
    every_token, every_log_prob = torch.stack(tokens, 1), torch.stack(log_probs, 1)
    below = None
    if corrected is not None and drafter.num_heads > 1:
        below = _ranked_below(corrected, states, every_token, every_log_prob, divisors.to(states.device))
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


def exact_logits(drafter: ScoringDrafter, states: Tensor, head: int) -> Tensor:
    """Float32 logits [M, N] of one head, whatever precision the states [M, D] were computed in.

    Bfloat16 logits of size 16 lie an eighth apart: ties would decide the ranks.
    """
    with torch.autocast(states.device.type, enabled=False):
        return drafter.head_logits(states.to(drafter.dtype), head).float()


def exact_logits_below(drafter: ScoringDrafter, states: Tensor, head: int, above: Tensor) -> Tensor:
    """The same, given the tokens [M] above, of a head behind the first of a drafter with a path correction."""
    logits, corrected = exact_logits(drafter, states, head), with_paths(drafter)
    if corrected is None or head == 0:
        return logits
    with torch.autocast(states.device.type, enabled=False):
        states = states.to(drafter.dtype)
        return corrected.given_above(logits, states, corrected.correction(states, above), drafter.own_weights(head))


class Replays:
    """The answers of a drafter's batches as they would have been decoded, trees of up to `num_nodes` growing as they
    do; of a drafter that is asked in rounds at the end, when it is known how good its ranks are."""

    def __init__(self, drafter: ScoringDrafter, num_nodes: int) -> None:
        self._in_rounds, self._num_nodes = drafter.heads_a_round < drafter.num_heads, num_nodes
        self._left: list[tuple[list[int], list[list[int]]]] = []  # next tokens of an answer, their ranks at its rows

    @property
    def num_ranks(self) -> int:
        """Ranks they want from each head."""
        return NUM_RANKS if self._in_rounds else max(NUM_RANKS, self._num_nodes - 1)

    def of(self, ranked: RankedHeads, batch: PaddedBatch) -> Iterator[AnswerReplay]:
        """Those of a batch that can be replayed now."""
        if self._in_rounds:
            ranks = ranked.text_ranks(batch)
            self._left += [(next_ids, ranks[start : start + len(next_ids)]) for start, next_ids in answers_in(batch)]
            return

        def sizes(row: int, start: int, next_ids: list[int]) -> list[int]:
            return sizes_of_best_tree(ranked.candidates(start + row), next_ids[row:], ranked.num_ranks + 1)

        for start, next_ids in answers_in(batch):
            yield AnswerReplay(next_ids, partial(sizes, start=start, next_ids=next_ids))

    def left(self, accuracy: Tensor) -> Iterator[AnswerReplay]:
        """All others; accuracy [K, R]: how often each rank held the text's token."""
        if not self._left:
            return
        trees = NestedTemplates(accuracy.tolist(), self._num_nodes)

        def sizes(row: int, ranks: list[list[int]]) -> list[int]:
            return trees.sizes(ranks[row])

        for next_ids, ranks in self._left:
            yield AnswerReplay(next_ids, partial(sizes, ranks=ranks))


def count_hits(ranked: RankedHeads, batch: PaddedBatch, hits: Tensor, counts: Tensor) -> None:
    """Add, per head and rank, how often that rank held the text's token."""
    next_ids = batch.answer_rows.next_ids.cpu()
    for k in range(ranked.tokens.shape[1]):
        index = batch.answer_rows.aims(k).cpu()
        wanted = next_ids[index + k + 1]
        offered = ranked.ranked_tokens(k, index, next_ids[index + k])
        hits[k, : offered.shape[1]] += (offered == wanted[:, None]).float().sum(0)  # a tiny draft vocabulary has fewer
        counts[k] += index.numel()
