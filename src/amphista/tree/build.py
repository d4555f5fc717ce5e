"""The best static tree of N nodes for calibrated accuracies (arXiv 2401.10774, section 2.3.3, made exact).

`accuracy[k][r]` is how often head k's rank-r token is the text's. A node's value is the product of the accuracies
along its path; values fall along every path and the best N - 1 nodes under the root are found greedily.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from amphista.errors import ConfigError
from amphista.tree.candidates import Candidates
from amphista.tree.dynamic import best_first
from amphista.tree.template import TreeTemplate


def build_template(accuracy: Sequence[Sequence[float]], num_nodes: int) -> TreeTemplate:
    """The template of at most `num_nodes` nodes, root included, with the highest expected number of accepted tokens."""
    if num_nodes < 1:
        raise ConfigError(f"a tree of {num_nodes} nodes was asked for: expected at least 1, the root")
    grown = best_first(-1, ranked(accuracy), num_nodes, len(accuracy))
    paths: list[list[int]] = [[]]
    for token, parent in zip(grown.tokens[1:], grown.parents[1:], strict=True):
        paths.append([*paths[parent], token])
    return TreeTemplate.from_paths(paths)


def ranked(accuracy: Sequence[Sequence[float]]) -> Candidates:
    """Candidates whose tokens are ranks, as likely as they are accurate."""
    by_rank = [_best_ranks(ranks) for ranks in accuracy]
    log_values = [[_log(ranks[r]) for r in order] for ranks, order in zip(accuracy, by_rank, strict=True)]
    return Candidates(by_rank, log_values)


def expected_tau(accuracy: Sequence[Sequence[float]], template: TreeTemplate) -> float:
    """1 + the sum of path values: tokens committed per target forward, if heads erred independently."""
    values = [1.0]
    for node in range(1, template.num_nodes):
        depth = template.depths[node]
        values.append(values[template.parents[node]] * accuracy[depth - 1][template.ranks[node]])
    return sum(values)


def _best_ranks(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda rank: (-values[rank], rank))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
