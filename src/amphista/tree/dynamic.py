"""The best tree of N nodes for one step: best-first over the heads' own probabilities, and the graft's.

A node's score is the product of its tokens' probabilities along the path, each given what stands above it as far as
the drafter knows: parallel heads are independent given the context, a drafter with a path correction knows the token
above. A child never scores above its parent, so taking the best node again and again is optimal: the expected number of
accepted tokens is the sum of the chosen scores (OPT-Tree, arXiv 2406.17276; DDTree, arXiv 2604.12989).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from itertools import islice

from amphista.tree.candidates import Candidates
from amphista.tree.children import ChildCandidate, ChildCandidates, GrownNodes


def best_first(pending: int, candidates: Candidates, num_nodes: int, max_depth: int) -> GrownNodes:
    """Grow at most `num_nodes` nodes (the root included) at most `max_depth` deep.

    They come in the order they were chosen, so the first n are the best tree of n nodes.
    """
    grown = GrownNodes.root(pending)
    for _ in islice(next_nodes(grown, candidates, max_depth), num_nodes - 1):
        pass
    return grown


def next_nodes(grown: GrownNodes, candidates: Candidates, max_depth: int) -> Iterator[float]:
    """Add the best node that is left to a root alone, and then to what it has become; yields its log-score each time.

    A node is added when it is asked for, and not before: where trees compete for rows, few are looked at in vain.
    """
    offers = ChildCandidates(candidates, max_depth)
    # (-log score, depth, rank, parent, all ranks below it): ties go to the shallow
    frontier: list[tuple[float, int, int, int, list[ChildCandidate]]] = []

    def offer(depth: int, rank: int, parent: int, ranks: list[ChildCandidate]) -> None:
        if rank < len(ranks):
            score = grown.scores[parent] + ranks[rank].log_prob
            if score > -math.inf:
                heapq.heappush(frontier, (-score, depth, rank, parent, ranks))

    offer(1, 0, 0, offers.below(1, on_graft=True))
    while frontier:
        _, depth, rank, parent, ranks = heapq.heappop(frontier)
        child, node = ranks[rank], grown.num_nodes
        grown.add(parent, child)
        yield grown.scores[node]
        offer(depth, rank + 1, parent, ranks)  # the next sibling
        offer(depth + 1, 0, node, offers.below(depth + 1, on_graft=child.on_graft, parent_rank=child.rank))
