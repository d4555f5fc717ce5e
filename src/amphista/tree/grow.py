"""From what a user says about trees (`chain`, a number of nodes, a template file) to what grows one in each step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from amphista.errors import ConfigError
from amphista.tree.candidates import Candidates
from amphista.tree.dynamic import dynamic_tree
from amphista.tree.template import TreeTemplate
from amphista.tree.token_tree import TokenTree

DEFAULT_NUM_NODES = 8  # one fixed size for every drafter; benchmarks/ has the sweep


class Grower(Protocol):
    """Grows the tree of one step."""

    @property
    def num_ranks(self) -> int:
        """Ranks it wants from each head."""

    def grow(self, pending: int, candidates: Candidates, max_depth: int) -> TokenTree:
        """A tree over the pending token, at most `max_depth` deep."""


@dataclass(frozen=True)
class DynamicGrower:
    """Best-first under a node budget, root included."""

    num_nodes: int

    def __post_init__(self) -> None:
        if self.num_nodes < 1:
            raise ConfigError(f"a tree of {self.num_nodes} nodes was asked for: expected at least 1, the root")

    @property
    def num_ranks(self) -> int:
        return self.num_nodes - 1

    def grow(self, pending: int, candidates: Candidates, max_depth: int) -> TokenTree:
        return dynamic_tree(pending, candidates, self.num_nodes, max_depth)


@dataclass(frozen=True)
class ChainGrower:
    """The best token of each head, one below the other."""

    num_ranks: int = 1

    def grow(self, pending: int, candidates: Candidates, max_depth: int) -> TokenTree:
        return TreeTemplate.chain(min(candidates.num_heads, max_depth)).fill(pending, candidates, max_depth)


@dataclass(frozen=True)
class StaticGrower:
    """One template in every step."""

    template: TreeTemplate

    @property
    def num_ranks(self) -> int:
        return self.template.num_ranks

    def grow(self, pending: int, candidates: Candidates, max_depth: int) -> TokenTree:
        return self.template.fill(pending, candidates, max_depth)


def parse_tree(text: str | int | None) -> Grower:
    """`chain`, a number of nodes (root included) or a template file; None is the default number."""
    if text is None:
        return DynamicGrower(DEFAULT_NUM_NODES)
    if text == "chain":
        return ChainGrower()
    try:
        return DynamicGrower(int(text))
    except ValueError:
        pass
    path = Path(str(text)).expanduser()
    if not path.is_file():
        raise ConfigError(f"--tree {text!r} is neither 'chain', a number of nodes, nor a template file")
    return StaticGrower(TreeTemplate.read(path))
