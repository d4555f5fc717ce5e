"""The best tree of N nodes for one step: best-first over the heads' own probabilities.

Heads are independent given the context, so a node's score is the product of its tokens' probabilities along the path,
a child never scores above its parent, and taking the best node again and again is optimal: the expected number of
accepted tokens is the sum of the chosen scores (OPT-Tree, arXiv 2406.17276; DDTree, arXiv 2604.12989).
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from amphista.tree.candidates import Candidates
from amphista.tree.token_tree import TokenTree


@dataclass(frozen=True)
class GrownNodes:
    """Nodes in the order they were chosen, so the first n are the best tree of n nodes; log-scores per node."""

    tokens: list[int]
    parents: list[int]
    scores: list[float]


def best_first(pending: int, candidates: Candidates, num_nodes: int, max_depth: int) -> GrownNodes:
    """Grow at most `num_nodes` nodes (the root included) at most `max_depth` deep."""
    tokens, parents, scores = [pending], [-1], [0.0]
    depth_limit = min(max_depth, candidates.num_heads)
    frontier: list[tuple[float, int, int, int]] = []  # (-log score, depth, rank, parent): ties go to the shallow

    def offer(depth: int, rank: int, parent: int) -> None:
        if depth <= depth_limit and rank < len(candidates.tokens[depth - 1]):
            score = scores[parent] + candidates.log_probs[depth - 1][rank]
            if score > -math.inf:
                heapq.heappush(frontier, (-score, depth, rank, parent))

    offer(1, 0, 0)
    while frontier and len(tokens) < num_nodes:
        negative, depth, rank, parent = heapq.heappop(frontier)
        tokens.append(candidates.tokens[depth - 1][rank])
        parents.append(parent)
        scores.append(-negative)
        offer(depth, rank + 1, parent)  # the next sibling
        offer(depth + 1, 0, len(tokens) - 1)  # the first child
    return GrownNodes(tokens, parents, scores)


def dynamic_tree(pending: int, candidates: Candidates, num_nodes: int, max_depth: int) -> TokenTree:
    """The best tree of at most `num_nodes` nodes for this step."""
    grown = best_first(pending, candidates, num_nodes, max_depth)
    return TokenTree(grown.tokens, grown.parents)
