"""Candidates: what a drafter offers a tree, per depth the best tokens and their log-probabilities; and an n-gram draft.

A drafter that knows paths also says, below each of its tokens, which of the next depth's come how likely. One that is
asked in rounds says nothing else: what stands at a depth then belongs to one token above each (`asking.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NgramDraft:
    """One chain of tokens, grafted on the tree below its root.

    `log_probs[d]` is that of the token d + 1 deep, those above being right. num_forced: how many of the first are all
    that an answer's form allows.
    """

    tokens: list[int]
    log_probs: list[float]
    num_forced: int = 0


def with_forced(graft: NgramDraft | None, forced: list[int]) -> NgramDraft | None:
    """A graft that begins with what is certain, and goes on as it said where it agrees with that."""
    if not forced:
        return graft
    length = len(forced)
    if graft is None or graft.tokens[:length] != forced:
        return NgramDraft(forced, [0.0] * length, length)
    return NgramDraft(graft.tokens, [0.0] * length + graft.log_probs[length:], length)


@dataclass(frozen=True, eq=False)
class ConditionalRanks:
    """The children of each token: below `tokens[k][i]`, the j-th best is `tokens[k + 1][ranks[k][i][j]]`.

    Its natural log-probability, given `tokens[k][i]` above it, is `log_probs[k][i][j]`; best first. Both are lists, or
    arrays where there are as many below each: trees ask for few of them. is_whole: nothing is on offer at these depths
    but what stands below some token here.
    """

    ranks: Sequence[Sequence[Sequence[int]]] | NDArray[Any]
    log_probs: Sequence[Sequence[Sequence[float]]] | NDArray[Any]
    is_whole: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConditionalRanks) and self._listed() == other._listed()

    def _listed(self) -> tuple[object, ...]:
        parts = (part.tolist() if isinstance(part, np.ndarray) else part for part in (self.ranks, self.log_probs))
        return *parts, self.is_whole

    def children(self, depth: int, rank: int) -> tuple[list[int], list[float]]:
        """Of the token of this rank at a depth, from 0: their ranks and log-probabilities."""
        ranks, log_probs = self.ranks[depth][rank], self.log_probs[depth][rank]
        if isinstance(ranks, np.ndarray) and isinstance(log_probs, np.ndarray):
            return ranks.tolist(), log_probs.tolist()
        return list(ranks), list(log_probs)


@dataclass(frozen=True)
class Candidates:
    """`tokens[k][r]` at depth k + 1 with natural log-probability `log_probs[k][r]`, and at most one graft.

    Ranks are in descending probability and a head never offers a token twice below the same one. `below`: of a drafter
    that knows paths; `log_probs` then hold at depth 1, and wherever `below` says nothing. `num_rounds`: of asking;
    `further_round`: whether the next depth takes one more.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    graft: NgramDraft | None = None
    below: ConditionalRanks | None = None
    num_rounds: int = 1
    further_round: bool = True

    @property
    def num_heads(self) -> int:
        return len(self.tokens)

    @property
    def max_depth(self) -> int:
        """How deep what is offered reaches."""
        return max(self.num_heads, 0 if self.graft is None else len(self.graft.tokens))
