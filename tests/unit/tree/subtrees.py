"""All subtrees of a small candidate set, one by one: the slow reference for everything that picks a best tree."""

from __future__ import annotations

import itertools
import math


def all_paths(widths):
    """Every rank path of a full tree with so many ranks per depth."""
    return [p for depth in range(1, len(widths) + 1) for p in itertools.product(*(range(w) for w in widths[:depth]))]


def rooted_sets(paths, size):
    """Every set of `size` paths that holds the prefixes of its members."""
    for chosen in itertools.combinations(paths, size):
        kept = set(chosen)
        if all(len(path) == 1 or path[:-1] in kept for path in kept):
            yield kept


def best_value(probs, num_nodes):
    """The highest 1 + sum of path products of any tree with at most `num_nodes` nodes, root included."""
    paths = all_paths([len(ranks) for ranks in probs])
    value = {path: math.prod(probs[depth][rank] for depth, rank in enumerate(path)) for path in paths}
    size = min(num_nodes - 1, len(paths))
    return 1 + max(math.fsum(value[path] for path in kept) for kept in rooted_sets(paths, size))
