"""What may stand below a node, heads and n-gram draft put together; and the nodes of a tree that grows from it.

Heads know depths, not paths: every node of a depth has the same children on offer, unless the drafter knows paths
(`ConditionalRanks`): then a node has its own, those of its token. The n-gram draft is grafted on the tree; below its
nodes its next token joins them: as often as that draft knows, its token comes; else the heads decide. So a token both
name is offered once and gains by it, the others lose in proportion, and no node promises more than one child. On
answers of the default target this met the truth within a few hundredths; the higher of the two fell far short of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, repeat
from typing import NamedTuple

from amphista.tree.candidates import Candidates
from amphista.tree.token_tree import TokenTree

NO_RANK = -1  # of a token that the heads do not name at its depth


class ChildCandidate(NamedTuple):
    """One possible child: its token, natural log-probability, whether the graft goes on below it, its head's rank."""

    token: int
    log_prob: float
    on_graft: bool
    rank: int = NO_RANK


class ChildCandidates:
    """Children on offer by depth and, of a drafter that knows paths, by parent; best first, none below `max_depth`."""

    def __init__(self, candidates: Candidates, max_depth: int) -> None:
        self._tokens, self._log_probs = candidates.tokens, candidates.log_probs
        self._num_heads, self._paths = min(candidates.num_heads, max_depth), candidates.below
        self._made: dict[tuple[int, int], list[ChildCandidate]] = {}  # (depth, rank above): most are never asked for
        self._graft, self._grafted = candidates.graft, dict[int, list[ChildCandidate]]()  # by depth
        self._graft_depth = 0 if self._graft is None else min(max_depth, len(self._graft.tokens))

    def below(self, depth: int, *, on_graft: bool, parent_rank: int = NO_RANK) -> list[ChildCandidate]:
        """What may stand at this depth (1 or more), below a node of the graft (the root is one) or another.

        parent_rank: the rank of the node above among what its head offers.
        """
        if on_graft and depth <= self._graft_depth:
            return self._below_graft(depth)
        if depth > self._num_heads:
            return []
        if self._paths is None or depth == 1 or parent_rank >= len(self._paths.ranks[depth - 2]):
            parent_rank = NO_RANK
        elif parent_rank == NO_RANK and self._paths.is_whole:
            return []
        known = self._made.get((depth, parent_rank))
        if known is None:
            known = self._made[depth, parent_rank] = self._children(depth, parent_rank)
        return known

    def _below_graft(self, depth: int) -> list[ChildCandidate]:
        known = self._grafted.get(depth)
        if known is None:
            assert self._graft is not None
            tokens, log_probs = self._graft.tokens, self._graft.log_probs
            above = self._graft_rank(depth - 1) if depth > 1 else NO_RANK
            heads = self.below(depth, on_graft=False, parent_rank=above)
            rank = self._rank(depth, tokens[depth - 1], heads)
            known = self._grafted[depth] = _joined(heads, tokens[depth - 1], log_probs[depth - 1], rank)
        return known

    def _children(self, depth: int, parent_rank: int) -> list[ChildCandidate]:
        tokens = self._tokens[depth - 1]
        if self._paths is None or parent_rank == NO_RANK:
            offers = list(map(ChildCandidate, tokens, self._log_probs[depth - 1], repeat(False), count()))
            return offers if self._paths is None else sorted(offers, key=lambda offer: -offer.log_prob)
        below = zip(*self._paths.children(depth - 2, parent_rank), strict=True)
        return [ChildCandidate(tokens[rank], value, False, rank) for rank, value in below]

    def _graft_rank(self, depth: int) -> int:
        """That of the graft's token at a depth."""
        return next(offer.rank for offer in self._below_graft(depth) if offer.on_graft)

    def _rank(self, depth: int, token: int, heads: list[ChildCandidate]) -> int:
        """Where a token of the graft stands among what the head of its depth offers; asked only where paths are.

        heads: what they offer below the graft's token above.
        """
        if self._paths is not None and self._paths.is_whole:
            return next((offer.rank for offer in heads if offer.token == token), NO_RANK)
        if self._paths is None or depth > self._num_heads or token not in self._tokens[depth - 1]:
            return NO_RANK
        return self._tokens[depth - 1].index(token)


def _joined(heads: list[ChildCandidate], token: int, log_prob: float, rank: int = NO_RANK) -> list[ChildCandidate]:
    said = next((math.exp(offer.log_prob) for offer in heads if offer.token == token), 0.0)
    unknown = max(1 - math.exp(log_prob), 1e-9)
    share, left = min(1.0, math.exp(log_prob) + unknown * said), math.log(unknown)
    joined = math.log(share) if share else log_prob  # below all numbers, as noise may have it
    others = [other._replace(log_prob=other.log_prob + left) for other in heads if other.token != token]
    return sorted([ChildCandidate(token, joined, True, rank), *others], key=lambda offer: -offer.log_prob)


@dataclass
class GrownNodes:
    """Nodes in the order they were added; per node its log-score, the sum of log-probabilities along its path.

    `ranks`: of each node among what the head of its depth offers.
    """

    tokens: list[int]
    parents: list[int]
    scores: list[float]
    on_graft: list[bool]
    ranks: list[int]

    @classmethod
    def root(cls, pending: int) -> GrownNodes:
        """A tree of the pending token alone."""
        return cls([pending], [-1], [0.0], [True], [NO_RANK])

    @property
    def num_nodes(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, offer: ChildCandidate) -> None:
        """Put a node below `parent`."""
        self.tokens.append(offer.token)
        self.parents.append(parent)
        self.scores.append(self.scores[parent] + offer.log_prob)
        self.on_graft.append(offer.on_graft)
        self.ranks.append(offer.rank)

    def tree(self, num_nodes: int | None = None) -> TokenTree:
        """The first `num_nodes` nodes as a token tree; by default all."""
        return TokenTree(self.tokens[:num_nodes], self.parents[:num_nodes])

    def expected(self, num_nodes: int | None = None) -> float:
        """Accepted draft tokens to expect of the first `num_nodes` nodes: the sum of their scores, the root's not."""
        return sum(map(math.exp, self.scores[1:num_nodes]))


@dataclass(frozen=True)
class Growth:
    """The tree of one step, and how many of its drafted tokens are expected to be accepted; the nodes' log-scores."""

    tree: TokenTree
    expected: float
    scores: Sequence[float] = ()

    @classmethod
    def of(cls, grown: GrownNodes, num_nodes: int | None = None) -> Growth:
        """The first `num_nodes` nodes; by default all."""
        return cls(grown.tree(num_nodes), grown.expected(num_nodes), grown.scores[:num_nodes])
