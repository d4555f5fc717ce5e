"""What may stand below a node, heads and graft put together; and the nodes of a tree that grows from such offers.

Heads know depths, not paths: every node of a depth has the same children on offer, but for the nodes of the graft,
below which its next token joins them: as often as the graft knows, its token comes; else the heads decide. So a token
both name is offered once and gains by it, the others lose in proportion, and no node promises more than one child. On
answers of the default target this met the truth within a few hundredths; the higher of the two fell far short of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from amphista.tree.candidates import Candidates
from amphista.tree.token_tree import TokenTree


class Offer(NamedTuple):
    """One possible child: its token, its natural log-probability, and whether the graft goes on below it."""

    token: int
    log_prob: float
    on_graft: bool


class Offers:
    """Children on offer by depth, best first; none deeper than `max_depth`."""

    def __init__(self, candidates: Candidates, max_depth: int) -> None:
        heads = zip(candidates.tokens[:max_depth], candidates.log_probs[:max_depth], strict=True)
        self._plain = [[Offer(*offered, False) for offered in zip(*head, strict=True)] for head in heads]
        self._grafted: list[list[Offer]] = []
        if candidates.graft is not None:
            chain = zip(candidates.graft.tokens, candidates.graft.log_probs, strict=True)
            for depth, (token, log_prob) in enumerate(islice(chain, max_depth)):
                heads_below = self._plain[depth] if depth < len(self._plain) else []
                self._grafted.append(_joined(heads_below, token, log_prob))

    def below(self, depth: int, *, on_graft: bool) -> list[Offer]:
        """What may stand at this depth (1 or more), below a node of the graft (the root is one) or another."""
        if on_graft and depth <= len(self._grafted):
            return self._grafted[depth - 1]
        return self._plain[depth - 1] if depth <= len(self._plain) else []


def _joined(heads: list[Offer], token: int, log_prob: float) -> list[Offer]:
    said = next((math.exp(offer.log_prob) for offer in heads if offer.token == token), 0.0)
    unknown = max(1 - math.exp(log_prob), 1e-9)
    share, left = min(1.0, math.exp(log_prob) + unknown * said), math.log(unknown)
    others = [Offer(other.token, other.log_prob + left, False) for other in heads if other.token != token]
    return sorted([Offer(token, math.log(share), True), *others], key=lambda offer: -offer.log_prob)


@dataclass(frozen=True)
class GrownNodes:
    """Nodes in the order they were added; per node its log-score, the sum of log-probabilities along its path."""

    tokens: list[int]
    parents: list[int]
    scores: list[float]
    on_graft: list[bool]

    @classmethod
    def root(cls, pending: int) -> GrownNodes:
        """A tree of the pending token alone."""
        return cls([pending], [-1], [0.0], [True])

    @property
    def num_nodes(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, offer: Offer) -> None:
        """Put a node below `parent`."""
        self.tokens.append(offer.token)
        self.parents.append(parent)
        self.scores.append(self.scores[parent] + offer.log_prob)
        self.on_graft.append(offer.on_graft)

    def tree(self, num_nodes: int | None = None) -> TokenTree:
        """The first `num_nodes` nodes as a token tree; by default all."""
        return TokenTree(self.tokens[:num_nodes], self.parents[:num_nodes])

    def expected(self, num_nodes: int | None = None) -> float:
        """Accepted draft tokens to expect of the first `num_nodes` nodes: the sum of their scores, the root's not."""
        return sum(map(math.exp, self.scores[1:num_nodes]))
