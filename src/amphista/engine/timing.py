"""What a step costs here, timed: forwards over 1, 2, ... rows, and drafting. `Cell` and `rounds` time anything.

Everything is timed in turns, round after round, so that a drifting machine hits all alike, and the shortest time is
kept: other programs only ever make a run longer, and they need not be there tomorrow. A forward is timed with what
follows it in a step (the root's token is chosen and committed), drafting with growing a tree, with feeding the rows
of two tokens, and with what the forward behind it takes longer, because the heads have taken its caches.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from amphista.cache.static import KVCache
from amphista.drafter.base import Ask, Drafter
from amphista.drafter.captured_drafter import captured
from amphista.engine.stats import now
from amphista.target.captured_forward import NODES
from amphista.target.spans import Span
from amphista.target.target import Target
from amphista.tree.candidates import Candidates
from amphista.tree.dynamic import best_first
from amphista.tree.grow import MAX_RANKS
from amphista.tree.token_tree import TokenTree

SIZES = {"cpu": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48), "cuda": (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)}
CONTEXT = 256  # rows behind the forward, or what the target's context leaves room for
DEAREST = 5.0  # forwards of one row; a tree that costs more is not looked at
BUDGET_SECONDS, MIN_ROUNDS, MAX_ROUNDS = 4.0, 3, 15
NOISY = 1.3  # median over shortest
FED_ROWS = 2
RUN_BEFORE = 3
LEAST_ASKING = 0.01  # forwards of one row
SEVERAL = 4  # sequences of a batch that are verified together, or whose heads are asked
GROWN_NODES = 16
LOOKED = 4  # tokens below which a further round of asking looks


@dataclass
class Cell:
    """One thing to time; `reset` undoes it, outside the clock. `before`: how often it is run first, for in decoding
    it mostly follows its like. A forward of one row behind one of 48 takes a fifth longer, and so on for some more (an
    Intel Xeon with AMX, 8 bits: benchmarks/xeon-amx-2-cores/auto-costs.txt)."""

    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None
    before: int = 0
    seconds: list[float] = field(default_factory=list)

    def time(self, device: torch.device) -> float:
        """Run it once, and what it takes."""
        for _ in range(self.before):
            self.run()
            self.reset()
        started = now(device)
        self.run()
        took = now(device) - started
        self.reset()
        return took

    @property
    def shortest(self) -> float:
        """What it takes undisturbed."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """The median over the shortest."""
        return statistics.median(self.seconds) / self.shortest


def rounds(cells: Sequence[Cell], device: torch.device) -> Iterator[int]:
    """Time every cell once a round, each round begun at another one, so that none always follows the same neighbour;
    yields the number of rounds done, without end."""
    for done in itertools.count():
        first = done % len(cells)
        for cell in [*cells[first:], *cells[:first]]:
            cell.seconds.append(cell.time(device))
        yield done + 1


@dataclass(frozen=True)
class ForwardSeconds:
    """Of a forward over a tree of n rows, by n, the first n is 1, with `context` rows cached; of each further sequence
    in it and each further cached row; the worst spread."""

    by_rows: dict[int, float]
    context: int
    sequence: float
    cached_row: float
    spread: float


def verify_seconds(target: Target) -> ForwardSeconds:
    """What forwards take on this machine."""
    cache, rows = _filled(target)
    cells: dict[int, Cell] = {}
    for size in _sizes(target, rows):
        cell = cells[size] = _forward(target, size, cache, rows)
        cell.time(target.device)  # the first time of a shape is not like the others
        while not cell.seconds or (len(cell.seconds) < MIN_ROUNDS and cell.shortest > DEAREST * cells[1].shortest):
            cell.seconds.append(cell.time(target.device))  # one long time may be another program's
        if cell.shortest > DEAREST * cells[1].shortest:
            break
    full, short = (_several(target, cache, num_cached) for num_cached in (rows, rows // 4))
    every = [*cells.values(), full, short]
    _time(target, every)
    most = cells[
        1
    ].shortest  # however disturbed: no sequence costs more than a forward, all cached rows no more than half
    cached_row = min(most / (2 * rows), max(0.0, full.shortest - short.shortest) / (SEVERAL * (rows - rows // 4)))
    alone = cells[min(SEVERAL, max(cells))].shortest
    sequence = min(most, max(0.0, full.shortest - alone - (SEVERAL - 1) * rows * cached_row) / (SEVERAL - 1))
    by_rows = {size: cell.shortest for size, cell in cells.items()}
    return ForwardSeconds(by_rows, rows, sequence, cached_row, max(cell.spread for cell in every))


class Asking(NamedTuple):
    """Seconds, in forwards of one row, of asking the heads of one sequence (the first round of it), of each further
    sequence, of each further round; the worst spread, of a draft that of a forward which is longer by as much."""

    ratio: float
    further: float
    further_round: float
    spread: float


def draft_ratio(target: Target, drafter: Drafter) -> Asking:
    """What asking costs; in fixed shapes where the target verifies in them."""
    drafter = captured(drafter, is_static=target.is_static)
    cache, rows = _filled(target)
    width = target.spec.row_width(drafter.taps)
    hidden = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(target.device, target.dtype)
    ids = torch.arange(rows, device=target.device) % target.spec.vocab_size
    states, start = [drafter.start() for _ in range(SEVERAL)], max(1, rows - FED_ROWS)
    for state in states:
        state.target_cache = cache
        drafter.commit(state, hidden[:start], ids[:start])
    probed = None if drafter.probes is None else hidden[: drafter.probes.num_rows, : target.spec.hidden_size]
    fed = hidden[-FED_ROWS:], ids[-FED_ROWS:].tolist(), probed

    one_row, verify = _forward(target, 1, cache, rows), _forward(target, SEVERAL, cache, rows)

    def cell(number: int, depth: int = drafter.heads_a_round) -> Cell:
        def draft() -> None:
            asks = [Ask(state, depth, *fed) for state in states[:number]]
            for drafted in drafter.draft_all(asks, MAX_RANKS, _look):
                best_first(0, drafted, GROWN_NODES, drafter.num_heads)
            verify.run()

        def undo() -> None:
            verify.reset()
            for state in states:
                drafter.trim(state, start)

        return Cell(draft, undo, before=1)

    num_rounds = -(-drafter.num_heads // drafter.heads_a_round)
    cells = [cell(1), cell(SEVERAL), verify, one_row]
    cells += [cell(1, drafter.num_heads)] if num_rounds > 1 else []
    for timed in cells:
        timed.time(target.device)
    _time(target, cells)
    one, several, verified, forward, *all_rounds = (timed.shortest for timed in cells)
    further = max(0.0, several - one) / (SEVERAL - 1)
    further_round = max(0.0, all_rounds[0] - one) / (num_rounds - 1) if all_rounds else 0.0
    spreads = [1 + (timed.spread - 1) * timed.shortest / forward for timed in cells]
    asking = max(one - verified, LEAST_ASKING * forward)  # however disturbed: it costs something
    return Asking(asking / forward, further / forward, further_round / forward, max(spreads))


def _look(drafts: Sequence[Candidates]) -> list[range]:
    """Below as many tokens in each round."""
    return [range(min(LOOKED, len(draft.tokens[-1]))) for draft in drafts]


def _filled(target: Target) -> tuple[KVCache, int]:
    """A cache with rows of random tokens, and how many."""
    rows = max(1, min(CONTEXT, target.spec.max_positions // 2))
    cache = target.new_cache()
    generator = torch.Generator().manual_seed(0)
    target.prefill(torch.randint(target.spec.vocab_size, (rows,), generator=generator).tolist(), cache)
    return cache, rows


def _sizes(target: Target, rows: int) -> list[int]:
    largest = min(target.spec.max_positions - rows, target.spec.vocab_size)
    sizes = NODES if target.is_static else SIZES.get(target.device.type, SIZES["cuda"])
    return [size for size in sizes if size <= largest]


def _forward(target: Target, num_nodes: int, cache: KVCache, rows: int) -> Cell:
    tree = TokenTree(list(range(num_nodes)), [-1, *((node - 1) // 2 for node in range(1, num_nodes))])

    def run() -> None:
        (output,) = target.forward([Span(tree, cache, only_choices=True)])
        if output.choices is None:
            int(output.logits[0].argmax())
        cache.commit([0])

    return Cell(run, lambda: cache.trim(rows), before=RUN_BEFORE)


def _several(target: Target, cache: KVCache, num_cached: int) -> Cell:
    """A forward over one row of each of several sequences, which begin as what is cached."""
    copies = [target.new_cache() for _ in range(SEVERAL)]
    for copy in copies:
        target.copy_rows(cache, copy, num_cached)
    spans = [Span(TokenTree.chain([token]), copy, only_choices=True) for token, copy in enumerate(copies)]

    def run() -> None:
        for output in target.forward(spans):
            if output.choices is None:
                int(output.logits[0].argmax())
        for copy in copies:
            copy.commit([0])

    def reset() -> None:
        for copy in copies:
            copy.trim(num_cached)

    return Cell(run, reset)


def _time(target: Target, cells: Sequence[Cell]) -> None:
    """Until the budget is spent: three of it on a disturbed machine."""
    started = now(target.device)
    for done in rounds(cells, target.device):
        spent = (now(target.device) - started) / BUDGET_SECONDS
        is_enough = spent > (3 if max(cell.spread for cell in cells) > NOISY else 1)
        if done == MAX_ROUNDS or (done >= MIN_ROUNDS and is_enough):
            return
