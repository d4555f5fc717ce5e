"""Span: what one sequence has in a forward. A forward is one flat row of tokens, the spans side by side.

Everything but attention does not care whose a row is; attention goes by span, each on its own cache. A chunk of a
prompt is a chain, a step of plain decoding a single root.
"""

from __future__ import annotations

from dataclasses import dataclass

from amphista.cache.static import KVCache
from amphista.tree.token_tree import TokenTree


@dataclass(frozen=True)
class Span:
    """A tree of tokens behind the committed rows of a cache; only_last: of the last node alone are logits wanted."""

    tree: TokenTree
    cache: KVCache
    only_last: bool = False

    @property
    def num_past(self) -> int:
        """Rows that all nodes see."""
        return self.cache.num_committed

    @property
    def positions(self) -> list[int]:
        """Of its nodes."""
        past = self.num_past
        return [past + depth for depth in self.tree.depths]

    @property
    def num_logits(self) -> int:
        return 1 if self.only_last else self.tree.num_nodes
