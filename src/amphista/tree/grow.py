"""From what a user says about trees (`chain`, a number of nodes, `static:N`, a file) to what grows one in each step."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from amphista.errors import ConfigError
from amphista.tree.build import build_template
from amphista.tree.candidates import Candidates
from amphista.tree.dynamic import dynamic_tree
from amphista.tree.template import TreeTemplate
from amphista.tree.token_tree import TokenTree

DEFAULT_NUM_NODES = 2  # one fixed size for every drafter: what breaks even on the machine of benchmarks/


class Grower(Protocol):
    """Grows the tree of one step."""

    @property
    def num_ranks(self) -> int:
        """Ranks it wants from each head."""

    @property
    def max_depth(self) -> int:
        """No tree of its grows deeper: heads beyond need not be asked."""

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

    @property
    def max_depth(self) -> int:
        return self.num_nodes - 1

    def grow(self, pending: int, candidates: Candidates, max_depth: int) -> TokenTree:
        return dynamic_tree(pending, candidates, self.num_nodes, max_depth)


@dataclass(frozen=True)
class ChainGrower:
    """The best token of each head, one below the other."""

    num_ranks: int = 1
    max_depth: int = sys.maxsize

    def grow(self, pending: int, candidates: Candidates, max_depth: int) -> TokenTree:
        return TreeTemplate.chain(min(candidates.num_heads, max_depth)).fill(pending, candidates, max_depth)


@dataclass(frozen=True)
class StaticGrower:
    """One template in every step."""

    template: TreeTemplate

    @property
    def num_ranks(self) -> int:
        return self.template.num_ranks

    @property
    def max_depth(self) -> int:
        return self.template.max_depth

    def grow(self, pending: int, candidates: Candidates, max_depth: int) -> TokenTree:
        return self.template.fill(pending, candidates, max_depth)


def parse_tree(text: str | int | None, accuracy: Sequence[Sequence[float]] | None = None) -> Grower:
    """`chain`, a number of nodes (root included), `static:N` or a template file; None is the default number.

    `static:N` is the best template of N nodes for the drafter's calibrated `accuracy` by depth and rank.
    """
    if text is None:
        return DynamicGrower(DEFAULT_NUM_NODES)
    name = str(text)
    if name == "chain":
        return ChainGrower()
    if re.fullmatch(r"[+-]?\d+", name):
        return DynamicGrower(int(name))
    if name.startswith("static:"):
        return _static(name, accuracy)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"--tree {name!r} is neither 'chain', a number of nodes, 'static:N', nor a template file")
    return StaticGrower(TreeTemplate.read(path))


def check_tree(text: str | int | None) -> None:
    """Raise ConfigError for what no drafter could make a tree of, before minutes of loading."""
    parse_tree(text, accuracy=[[1.0]])


def _static(name: str, accuracy: Sequence[Sequence[float]] | None) -> StaticGrower:
    size = name.removeprefix("static:")
    if not re.fullmatch(r"\d+", size):
        raise ConfigError(f"--tree {name!r}: expected static:N with a number of nodes, for example static:16")
    if not accuracy:
        raise ConfigError(f"--tree {name} needs a drafter with calibrated accuracies: this one has none")
    return StaticGrower(build_template(accuracy, int(size)))
