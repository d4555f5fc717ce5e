"""Below which nodes of a tree it pays to let a group of probe rows ride: what the group below the last accepted node
gives is the next draft, what the others give is not read.

A group below node n is worth P(n is the last accepted node) x the tokens a draft brings x the seconds of a token, and
costs what its rows add to the forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from amphista.tree.children import Growth


def last_accepted(growth: Growth) -> list[float]:
    """Of each node, how likely it is the last one that is accepted."""
    probabilities = [math.exp(score) for score in growth.scores]
    last = list(probabilities)
    for node, parent in enumerate(growth.tree.parents[1:], start=1):
        last[parent] -= probabilities[node]
    return [max(0.0, share) for share in last]


def nodes_that_pay(
    growth: Growth, nodes: Sequence[int], gain: float, seconds: Callable[[int], float], rows: tuple[int, int]
) -> list[int]:
    """Of some nodes, those worth a group. gain: tokens a draft brings; seconds: of the step by rows; rows: without
    probes, and of a group."""
    num_rows, size = rows
    token_seconds = seconds(num_rows) / (1 + growth.expected)
    last, chosen = last_accepted(growth), []
    for node in sorted(nodes, key=lambda node: -last[node]):
        price = seconds(num_rows + size) - seconds(num_rows)
        if last[node] * gain * token_seconds <= price:
            break
        chosen.append(node)
        num_rows += size
    return sorted(chosen)
