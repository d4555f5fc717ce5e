"""Span: what one sequence has in a forward. A forward is one flat row of tokens, the spans side by side.

Everything but attention does not care whose a row is; attention goes by span, each on its own cache. A chunk of a
prompt is a chain, a step of plain decoding a single root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from amphista.cache.static import KVCache
from amphista.target.spec import Probes
from amphista.tree.token_tree import TokenTree


@dataclass(frozen=True)
class Span:
    """A tree of tokens behind the committed rows of a cache; only_last: of the last node alone are logits wanted.

    only_choices: which logit is the largest is enough; where all spans of a forward say so, logits may be none. probes:
    whose inputs the tree's last nodes stand for, the token -1 - j for the j-th; no logits are made of them.
    """

    tree: TokenTree
    cache: KVCache
    only_last: bool = False
    only_choices: bool = False
    probes: Probes | None = None

    def probed(self, nodes: Sequence[int], probes: Probes) -> Span:
        """The same with all probes below each of these nodes."""
        if not nodes:
            return self
        tree = self.tree.with_chains(nodes, [-1 - j for j in range(probes.num_rows)])
        return replace(self, tree=tree, probes=probes)

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
    def num_probes(self) -> int:
        """Rows that are none of its tokens."""
        return 0 if self.probes is None else sum(token < 0 for token in self.tree.tokens)

    @property
    def num_logits(self) -> int:
        if self.only_last:
            return 1
        return self.tree.num_nodes if self.probes is None else self.tree.num_nodes - self.num_probes
