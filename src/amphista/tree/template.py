"""TreeTemplate: the static shape of a tree, no tokens: parent, depth and rank per node.

A template is written as rank paths: [0, 2] is the third-best token of head 2 below the best of head 1; if the drafter
knows paths, the third-best child of that very token. Node 0 is the root (the empty path).
As JSON: {"paths": [[0], [1], [0, 0], ...]}.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from amphista.errors import ConfigError
from amphista.tree.candidates import Candidates
from amphista.tree.children import ChildCandidates, GrownNodes
from amphista.tree.token_tree import TokenTree


@dataclass(frozen=True)
class TreeTemplate:
    """Parents [N] (-1 for the root) and ranks [N] (0 for the root); parents come before children."""

    parents: list[int]
    ranks: list[int]

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> TreeTemplate:
        """From rank paths in any order; every path's own prefix must be among them."""
        ordered = sorted({tuple(path) for path in paths if len(path)}, key=lambda path: (len(path), path))
        node_of: dict[tuple[int, ...], int] = {(): 0}
        parents, ranks = [-1], [0]
        for path in ordered:
            if min(path) < 0:
                raise ConfigError(f"tree path {list(path)} has a negative rank")
            if path[:-1] not in node_of:
                raise ConfigError(f"tree path {list(path)} has no parent: add the path {list(path[:-1])}")
            node_of[path] = len(parents)
            parents.append(node_of[path[:-1]])
            ranks.append(path[-1])
        return cls(parents, ranks)

    @classmethod
    def chain(cls, depth: int) -> TreeTemplate:
        """The best token of each head, one below the other."""
        return cls.from_paths([0] * length for length in range(1, depth + 1))

    @classmethod
    def read(cls, path: Path) -> TreeTemplate:
        """From a JSON file."""
        try:
            paths = json.loads(path.read_text(encoding="utf-8"))["paths"]
            if not all(type(rank) is int for ranks in paths for rank in ranks):
                raise TypeError("ranks must be whole numbers")
            return cls.from_paths(paths)
        except OSError as error:
            raise ConfigError(f"cannot read tree file {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            expected = '{"paths": [[0], [1], [0, 0]]}'
            raise ConfigError(f"tree file {path} is not a tree template ({error}): expected {expected}") from error

    @property
    def num_nodes(self) -> int:
        return len(self.parents)

    @property
    def depths(self) -> list[int]:
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return depths

    @property
    def max_depth(self) -> int:
        return max(self.depths)

    @property
    def num_ranks(self) -> int:
        """Ranks a drafter must offer."""
        return max(self.ranks) + 1

    @cached_property
    def inner(self) -> TreeTemplate:
        """The nodes that have children, and the root."""
        above = set(self.parents)
        return TreeTemplate.from_paths(path for node, path in enumerate(self.paths(), start=1) if node in above)

    def paths(self) -> list[list[int]]:
        """The rank path of every node but the root."""
        paths: list[list[int]] = [[]]
        for parent, rank in zip(self.parents[1:], self.ranks[1:], strict=True):
            paths.append([*paths[parent], rank])
        return paths[1:]

    def fill(self, pending: int, candidates: Candidates, max_depth: int) -> TokenTree:
        """A token tree of this shape; nodes that are too deep or that no candidate fills are left out."""
        return self.grow(pending, candidates, max_depth).tree()

    def grow(self, pending: int, candidates: Candidates, max_depth: int) -> GrownNodes:
        """The same, with the nodes' scores."""
        kept = {0: 0}
        grown, offers = GrownNodes.root(pending), ChildCandidates(candidates, max_depth)
        depths = self.depths
        for node in range(1, self.num_nodes):
            if (parent := kept.get(self.parents[node])) is None:
                continue
            ranks = offers.below(depths[node], on_graft=grown.on_graft[parent], parent_rank=grown.ranks[parent])
            if self.ranks[node] < len(ranks):
                kept[node] = grown.num_nodes
                grown.add(parent, ranks[self.ranks[node]])
        return grown
