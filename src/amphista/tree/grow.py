"""From what a user says about trees (`auto`, `chain`, a number of nodes, ...) to what grows one in each step."""

from __future__ import annotations

import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from amphista.errors import ConfigError
from amphista.tree.asking import UsualRounds, named_at
from amphista.tree.budget import DraftRow, NodeBudget, Plan
from amphista.tree.build import build_template
from amphista.tree.candidates import Candidates
from amphista.tree.children import GrownNodes, Growth
from amphista.tree.controller import DraftController
from amphista.tree.dynamic import best_first, next_nodes
from amphista.tree.learned import Forward
from amphista.tree.probing import nodes_that_pay
from amphista.tree.template import TreeTemplate
from amphista.tree.tune import NOTHING_PAYS, Costs

AUTO = "auto"
DEFAULT_TREE = AUTO
ALONE = Forward(num_rows=1)  # a plain step of one sequence
MAX_RANKS = 10  # of one head; a budget that pays hardly ever holds more


class Grower(ABC):
    """Grows the tree of one step."""

    @property
    @abstractmethod
    def num_ranks(self) -> int:
        """Ranks it wants from each head."""

    @property
    @abstractmethod
    def max_depth(self) -> int:
        """No tree of its grows deeper: what lies beyond need not be asked for."""

    @property
    def max_nodes(self) -> int:
        """No tree of its grows larger, the root included."""
        return self.max_depth + 1

    @abstractmethod
    def grow(self, pending: int, candidates: Candidates, max_depth: int) -> Growth:
        """A tree over the pending token, at most `max_depth` deep."""

    @abstractmethod
    def look_below(
        self, rows: Sequence[DraftRow], candidates: Sequence[Candidates], asked: Sequence[int], plain: Forward
    ) -> list[list[int]]:
        """After a round of a drafter that is asked in rounds: of each sequence that was asked the places, among what is
        on offer deepest, of the tokens below which it shall look next. None of any sequence ends the asking.
        """

    def whom_to_ask(self, rows: Sequence[DraftRow], plain: Forward) -> list[int]:
        """Indices of the sequences of a batch whose heads shall be asked in this step; to be called once a step.

        plain: the forward of this step if nothing were drafted.
        """
        return [b for b, row in enumerate(rows) if row.max_depth > 0]

    def looks_seldom(self, plain: Forward) -> bool:
        """Whether n-gram drafts pay so rarely that they are looked for in some steps only."""
        return False

    def grow_batch(
        self, rows: Sequence[DraftRow], candidates: Sequence[Candidates], asked: Sequence[int], plain: Forward
    ) -> Plan:
        """A tree for each sequence of a batch."""
        pairs = zip(rows, candidates, strict=True)
        return Plan(rows, [self.grow(row.pending, offered, row.max_depth) for row, offered in pairs], asked, plain)

    def where_to_probe(self, plan: Plan, b: int, nodes: Sequence[int]) -> Sequence[int]:
        """Of some nodes of a sequence's tree, those below which its drafter's probes shall stand; by default all."""
        return nodes

    def observe(  # noqa: B027
        self, plan: Plan, accepted: Sequence[Sequence[int]], seconds: float, planning: float = 0.0
    ) -> None:
        """Take note of the draft tokens that each tree of a step had accepted, its seconds, and those that finding out
        whom to ask took; most need not."""

    def rests(self, plain: Forward) -> bool:
        """Whether nothing is drafted in this step; to be asked once a step."""
        return False


@dataclass(frozen=True)
class AutoGrower(Grower):
    """As large as pays on this machine: best-first, cut where tokens per second are highest."""

    costs: Costs

    @property
    def num_ranks(self) -> int:
        return min(MAX_RANKS, self.max_depth)

    @property
    def max_depth(self) -> int:
        return self.costs.max_nodes - 1

    @cached_property
    def budget(self) -> NodeBudget:
        """It learns from the steps of this grower."""
        return NodeBudget(self.costs)

    @cached_property
    def rounds(self) -> UsualRounds:
        """Of the drafts so far."""
        return UsualRounds()

    def whom_to_ask(self, rows: Sequence[DraftRow], plain: Forward) -> list[int]:
        number = self.rounds.number
        return self.budget.whom_to_ask(rows, plain if number == 1 else plain._replace(num_rounds=number))

    def looks_seldom(self, plain: Forward) -> bool:
        return self.budget.looks_seldom(plain)

    def look_below(
        self, rows: Sequence[DraftRow], candidates: Sequence[Candidates], asked: Sequence[int], plain: Forward
    ) -> list[list[int]]:
        """What stands in the best trees, if it promises more tokens than another round, where it takes one, takes time.

        Below a token the next is hoped to be as likely as that token was: where a draft is sure it mostly stays so.
        """
        plain = _in_rounds(plain, candidates, asked)
        grown, sizes = self._best(rows, candidates, asked, plain)
        depth = max(candidates[b].num_heads for b in asked)
        able = {b for b in asked if candidates[b].num_heads == depth < rows[b].max_depth}
        nodes = {b: named_at(grown[b], depth, sizes[b]) if b in able else [] for b in asked}
        gain = sum(math.log1p(_hoped(grown[b], nodes[b]) / (1 + grown[b].expected(sizes[b]))) for b in asked)
        now = plain._replace(num_rows=plain.num_rows + sum(sizes) - len(sizes), num_asked=len(asked))
        rounds = plain.num_rounds + any(candidates[b].further_round for b in able)
        then = now._replace(num_rows=now.num_rows + sum(map(bool, nodes.values())), num_rounds=rounds)
        seconds = self.budget.costs.decoding
        pays = gain / len(rows) > math.log(seconds(then) / seconds(now))
        return [[grown[b].ranks[node] for node in nodes[b]] if pays else [] for b in asked]

    def grow_batch(
        self, rows: Sequence[DraftRow], candidates: Sequence[Candidates], asked: Sequence[int], plain: Forward
    ) -> Plan:
        if not self.max_depth or not (asked or any(row.graft is not None for row in rows)):  # nothing is on offer
            return Plan(rows, [Growth.of(GrownNodes.root(row.pending)) for row in rows], asked, plain)
        plain = _in_rounds(plain, candidates, asked)
        pairs = zip(*self._best(rows, candidates, asked, plain), strict=True)
        return Plan(rows, [Growth.of(tree, size) for tree, size in pairs], asked, plain)

    def _best(
        self, rows: Sequence[DraftRow], candidates: Sequence[Candidates], asked: Sequence[int], plain: Forward
    ) -> tuple[list[GrownNodes], list[int]]:
        """The nodes of each sequence, and how many of them its tree gets."""
        grown = [GrownNodes.root(row.pending) for row in rows]
        nodes = [next_nodes(*parts) for parts in zip(grown, candidates, (row.max_depth for row in rows), strict=True)]
        return grown, self.budget.share(rows, nodes, len(asked), plain)

    def where_to_probe(self, plan: Plan, b: int, nodes: Sequence[int]) -> Sequence[int]:
        seconds, rows = self.budget.costs.by_rows(plan.forward), (plan.forward.num_rows, plan.num_probes)
        return nodes_that_pay(plan.growths[b], nodes, plan.rows[b].controller.gain, seconds, rows)

    def rests(self, plain: Forward) -> bool:
        return self.budget.rests(plain)

    def observe(self, plan: Plan, accepted: Sequence[Sequence[int]], seconds: float, planning: float = 0.0) -> None:
        if self.max_depth:
            self.budget.observe(plan, accepted, seconds, planning)
            if plan.asked:
                self.rounds.note(plan.plain.num_rounds)

    def grow(self, pending: int, candidates: Candidates, max_depth: int) -> Growth:
        row = DraftRow(DraftController(), candidates.graft, max_depth, pending)
        return self.grow_batch([row], [candidates], [0] if candidates.num_heads else [], ALONE).growths[0]


class EachAlone(Grower):
    """Grows the tree of a sequence by what is on offer for it, whatever the others'."""

    @abstractmethod
    def nodes(self, pending: int, candidates: Candidates, max_depth: int) -> GrownNodes:
        """Its nodes."""

    def inner(self, pending: int, candidates: Candidates, max_depth: int) -> GrownNodes:
        """Those that may have children."""
        return self.nodes(pending, candidates, max_depth)

    def grow(self, pending: int, candidates: Candidates, max_depth: int) -> Growth:
        return Growth.of(self.nodes(pending, candidates, max_depth))

    def look_below(
        self, rows: Sequence[DraftRow], candidates: Sequence[Candidates], asked: Sequence[int], plain: Forward
    ) -> list[list[int]]:
        """All that would have children in the tree that would grow, as far as can be seen."""
        places = []
        for b in asked:
            grown = self.inner(rows[b].pending, candidates[b], rows[b].max_depth)
            places.append([grown.ranks[node] for node in named_at(grown, candidates[b].num_heads)])
        return places


@dataclass(frozen=True)
class DynamicGrower(EachAlone):
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

    def nodes(self, pending: int, candidates: Candidates, max_depth: int) -> GrownNodes:
        return best_first(pending, candidates, self.num_nodes, max_depth)


@dataclass(frozen=True)
class ChainGrower(EachAlone):
    """The best token of each depth, one below the other."""

    @property
    def num_ranks(self) -> int:
        return 1

    @property
    def max_depth(self) -> int:
        return sys.maxsize

    def nodes(self, pending: int, candidates: Candidates, max_depth: int) -> GrownNodes:
        chain = TreeTemplate.chain(min(candidates.max_depth, max_depth))
        return chain.grow(pending, candidates, max_depth)


@dataclass(frozen=True)
class StaticGrower(EachAlone):
    """One template in every step."""

    template: TreeTemplate

    @property
    def num_ranks(self) -> int:
        return self.template.num_ranks

    @property
    def max_depth(self) -> int:
        return self.template.max_depth

    @property
    def max_nodes(self) -> int:
        return self.template.num_nodes

    def nodes(self, pending: int, candidates: Candidates, max_depth: int) -> GrownNodes:
        return self.template.grow(pending, candidates, max_depth)

    def inner(self, pending: int, candidates: Candidates, max_depth: int) -> GrownNodes:
        return self.template.inner.grow(pending, candidates, max_depth)


def _hoped(grown: GrownNodes, nodes: Sequence[int]) -> float:
    """Tokens accepted below some nodes, each followed by one as likely as itself."""
    scores, parents = grown.scores, grown.parents
    return sum(math.exp(2 * scores[node] - scores[parents[node]]) for node in nodes)


def _in_rounds(plain: Forward, candidates: Sequence[Candidates], asked: Sequence[int]) -> Forward:
    """The plain step, with the rounds of asking that were taken beside it."""
    return plain._replace(num_rounds=max((candidates[b].num_rounds for b in asked), default=1))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What some trees are made of: the drafter's calibrated accuracy by depth and rank, the machine's costs."""

    accuracy: Sequence[Sequence[float]] | None = None
    costs: Costs | None = None


NOT_MEASURED = Measured()


def parse_tree(text: str | int | None, measured: Measured = NOT_MEASURED) -> Grower:
    """`auto`, `chain`, a number of nodes (root included), `static:N` or a template file; None is the default, `auto`.

    `auto` needs the costs, `static:N` (the best template of N nodes) the accuracy.
    """
    name = str(DEFAULT_TREE if text is None else text)
    if name == AUTO:
        if measured.costs is None:
            raise ConfigError("--tree auto needs measured costs: load the target and the drafter together")
        return AutoGrower(measured.costs)
    if name == "chain":
        return ChainGrower()
    if re.fullmatch(r"[+-]?\d+", name):
        return DynamicGrower(int(name))
    if name.startswith("static:"):
        return _static(name, measured.accuracy)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"--tree {name!r} is neither auto, chain, a number of nodes, static:N, nor a template file")
    return StaticGrower(TreeTemplate.read(path))


def check_tree(text: str | int | None) -> None:
    """Raise ConfigError for what no drafter could make a tree of, before minutes of loading."""
    parse_tree(text, Measured(accuracy=[[1.0]], costs=NOTHING_PAYS))


def _static(name: str, accuracy: Sequence[Sequence[float]] | None) -> StaticGrower:
    size = name.removeprefix("static:")
    if not re.fullmatch(r"\d+", size):
        raise ConfigError(f"--tree {name!r}: expected static:N with a number of nodes, for example static:16")
    if not accuracy:
        raise ConfigError(f"--tree {name} needs a drafter with calibrated accuracies: this one has none")
    return StaticGrower(build_template(accuracy, int(size)))
