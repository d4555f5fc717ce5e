"""TokenTree: the tokens one verify forward reads, and who descends from whom.

Node 0 is the root, the pending token. Parents come before children and no two siblings carry the same token, so the
target's choice at a node names at most one child.

Shapes: N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenTree:
    """Tokens [N] and parents [N] (-1 for the root)."""

    tokens: list[int]
    parents: list[int]

    def __post_init__(self) -> None:
        assert self.tokens and self.parents[0] == -1 and len(self.tokens) == len(self.parents)
        assert all(0 <= parent < node for node, parent in enumerate(self.parents) if node)
        assert len(self._children) == len(self.tokens) - 1, "two siblings carry the same token"

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> TokenTree:
        """Each token below the one before."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)))

    def with_chains(self, nodes: Sequence[int], tokens: Sequence[int]) -> TokenTree:
        """The same with a chain of these tokens below each of some nodes, one chain behind the other at its end."""
        end, size = len(self.tokens), len(tokens)
        parents = [node if j == 0 else end + i * size + j - 1 for i, node in enumerate(nodes) for j in range(size)]
        return TokenTree([*self.tokens, *list(tokens) * len(nodes)], [*self.parents, *parents])

    @property
    def num_nodes(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether it has a single path."""
        return self.depths[-1] == self.num_nodes - 1

    @cached_property
    def depths(self) -> list[int]:
        """Depth of each node; the root has 0. A node's position is that of the root plus its depth."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return depths

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        return {(self.parents[node], self.tokens[node]): node for node in range(1, len(self.tokens))}

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`."""
        return self._children.get((node, token))

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`, both included."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def ancestor_bits(self) -> list[int]:
        """The rows of `ancestor_mask` as integers: bit j of number i is set where row i is True at j."""
        rows = [1]
        for node, parent in enumerate(self.parents[1:], start=1):
            rows.append(rows[parent] | 1 << node)
        return rows

    def ancestor_mask(self) -> Tensor:
        """bool [N, N]: row i is True at i and at every ancestor of i."""
        if self.is_chain:
            return torch.ones(self.num_nodes, self.num_nodes, dtype=torch.bool).tril_()
        mask = np.eye(self.num_nodes, dtype=bool)
        for node in range(1, self.num_nodes):
            mask[node] |= mask[self.parents[node]]
        return torch.from_numpy(mask)
