"""Asking in rounds: what a drafter that reads drafted tokens has said so far, and below which of them to look next.

Each round looks below some of the tokens that the round before has named. For trees of N nodes nothing is lost by that:
whatever may still come below others, what stands in the best tree of all stands in the best tree of what is known so
far, too, so who looks below the nodes of that in every round misses none.
"""

from __future__ import annotations

from collections.abc import Sequence

from amphista.tree.candidates import Candidates, ConditionalRanks
from amphista.tree.children import NO_RANK, GrownNodes

MEMORY = 0.9  # what a past draft still counts after a further one


class Offered:
    """What was offered of one sequence, depth by depth, of which one round gives several. A token's place is its index
    among all of its depth."""

    def __init__(self, depths_a_round: int = 1) -> None:
        self._depths_a_round = depths_a_round
        self._tokens: list[list[int]] = []
        self._scores: list[float] = []  # of the deepest: sums of log-probabilities along their paths
        self._log_probs: list[list[float]] = []
        self._places: list[list[list[int]]] = []  # of the children of each place of each depth
        self._given: list[list[list[float]]] = []

    def add(self, parents: Sequence[int], tokens: Sequence[list[int]], log_probs: Sequence[list[float]]) -> None:
        """A depth more: the children of some places of the deepest one, best first; at first of the root alone,
        whatever `parents` says."""
        scores = self._scores or [0.0]
        above = parents if self._tokens else [0]
        self._scores = [scores[p] + v for p, values in zip(above, log_probs, strict=True) for v in values]
        if self._tokens:
            places: list[list[int]] = [[] for _ in self._tokens[-1]]
            given: list[list[float]] = [[] for _ in self._tokens[-1]]
            start = 0
            for parent, children, values in zip(parents, tokens, log_probs, strict=True):
                places[parent] = list(range(start, start + len(children)))
                given[parent] = values
                start += len(children)
            self._places.append(places)
            self._given.append(given)
        self._tokens.append([token for children in tokens for token in children])
        self._log_probs.append([value for values in log_probs for value in values])

    @property
    def deepest(self) -> list[int]:
        """The tokens of the last depth, by their places."""
        return self._tokens[-1]

    def likeliest(self, number: int) -> list[int]:
        """The places of the likeliest tokens of the last depth, as EAGLE-2 (arXiv 2406.16858) chooses them."""
        return sorted(sorted(range(len(self._scores)), key=lambda place: -self._scores[place])[:number])

    @property
    def candidates(self) -> Candidates:
        """For trees to grow from, with the rounds that were needed, and whether the next depth needs another."""
        below = ConditionalRanks(self._places[:], self._given[:], is_whole=True)
        whole, begun = divmod(len(self._tokens), self._depths_a_round)
        rounds = whole + bool(begun)
        return Candidates(self._tokens[:], self._log_probs[:], None, below, rounds, further_round=not begun)


def named_at(grown: GrownNodes, depth: int, num_nodes: int | None = None) -> list[int]:
    """The nodes at a depth, of the first `num_nodes` (default: all), that heads have named."""
    depths = [0]
    for parent in grown.parents[1:num_nodes]:
        depths.append(depths[parent] + 1)
    return [node for node, at in enumerate(depths) if at == depth and grown.ranks[node] != NO_RANK]


class UsualRounds:
    """How many rounds drafts have taken lately, for those who weigh whether to begin another one."""

    def __init__(self) -> None:
        self.number = 1.0

    def note(self, num_rounds: float) -> None:
        """Count a draft."""
        self.number += (1 - MEMORY) * (num_rounds - self.number)
