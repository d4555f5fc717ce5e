"""Who guessed a token, and what one step looked like: for those who want to see how an answer came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from amphista.tree.candidates import Candidates
from amphista.tree.token_tree import TokenTree


class Source(StrEnum):
    """Who named a token first: the drafter's heads, the n-gram lookup, both, the form an answer must have, where that
    leaves no choice, or nobody but the target."""

    HEADS = "heads"
    LOOKUP = "lookup"
    BOTH = "both"
    FORM = "form"
    TARGET = "target"


@dataclass(frozen=True)
class StepTrace:
    """The tree of one step. `sources` and `scores` of every node, the root's first: `scores` are sums of
    log-probabilities along its path. path: nodes that the target chose. seconds: of the whole step."""

    tree: TokenTree
    sources: list[Source]
    scores: Sequence[float]
    path: list[int]
    seconds: float


def sources(tree: TokenTree, candidates: Candidates, nodes: Sequence[int]) -> list[Source]:
    """Who named each of some nodes, the first of which is the root: that is the target's. Parents come before children.

    A graft is one path below the root; heads name tokens by depth.
    """
    graft = [] if candidates.graft is None else candidates.graft.tokens
    on_graft, found = {nodes[0]}, [Source.TARGET]
    for node in nodes[1:]:
        depth, token = tree.depths[node], tree.tokens[node]
        by_heads = depth <= candidates.num_heads and token in candidates.tokens[depth - 1]
        if tree.parents[node] in on_graft and graft[depth - 1 : depth] == [token]:
            on_graft.add(node)
            is_forced = candidates.graft is not None and depth <= candidates.graft.num_forced
            found.append(Source.FORM if is_forced else Source.BOTH if by_heads else Source.LOOKUP)
        else:
            found.append(Source.HEADS)
    return found
