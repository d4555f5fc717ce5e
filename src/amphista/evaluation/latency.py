"""How long a target's forward takes over nodes, batch and context, how long drafting takes, and what follows from both.

    speedup ~ tau / ((T_verify(n) + T_draft(n) + T_feed) / T_verify(1))

T_verify(n): one forward over a tree of n nodes behind `context` committed rows, masks and positions included, the way
decoding does it. T_draft(n): the drafter's heads and the tree grown from them. T_feed: giving the drafter the rows of
two committed tokens. Not in it: accepting, committing, text. The tau at which drafting starts to pay needs no drafter
that was ever trained, so sizes nobody holds the weights of can be judged; whatever rests on it is called projected.

All cells of one context and batch are measured in turn, round after round, so that a drifting machine hits all alike.
Beside each forward stands the least it could take here (limits.py).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from amphista import provenance
from amphista.cache.static import KVCache
from amphista.drafter.base import Drafter
from amphista.drafter.captured import captured
from amphista.drafter.heads import ParallelHeads
from amphista.errors import ConfigError
from amphista.evaluation.limits import ForwardWork, Limits, measure_limits
from amphista.evaluation.stock import now
from amphista.target.attention import Layout
from amphista.target.shapes import free_bytes, without_layers
from amphista.target.target import Target
from amphista.tree.build import build_template
from amphista.tree.candidates import Candidates
from amphista.tree.grow import DynamicGrower
from amphista.tree.token_tree import TokenTree

FORMAT = 2
TREE_DEPTH = 5  # heads of the shipped drafters: a tree of many nodes is wide, not deep
FED_ROWS = (1, 2, 4)
TYPICAL_FEED = 2
SEED = 0
Report = Callable[[int, int, str], None]
Measures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """What is timed: every combination of `nodes` (root included), `contexts` (rows) and `batches` (sequences).

    rounds: timed repetitions of each, after one that is not timed. num_layers: the layers the numbers shall stand for;
    where the target holds fewer, the cost of its layers is scaled up to them. tau: assumed for projections, by nodes.
    """

    nodes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (256,)
    batches: tuple[int, ...] = (1,)
    rounds: int = 7
    num_layers: int | None = None
    tau: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for option, values in (("nodes", self.nodes), ("contexts", self.contexts), ("batches", self.batches)):
            if not values or min(values) < 1 or len(set(values)) != len(values):
                raise ConfigError(f"--{option} is {_listed(values)!r}: expected distinct whole numbers of at least 1")
        if 1 not in self.nodes:
            raise ConfigError(
                f"--nodes is {_listed(self.nodes)!r}: 1 must be among them, it is what others are compared to"
            )
        if self.rounds < 1:
            raise ConfigError(f"--rounds is {self.rounds}: expected at least 1")
        for nodes, tau in self.tau:
            if nodes not in self.nodes or tau < 1:
                raise ConfigError(f"--tau {nodes}={tau:g}: expected one of the --nodes and a tau of at least 1")


@dataclass
class Cell:
    """One thing to time. `key` says what it is; `reset` undoes it, outside the clock."""

    key: dict[str, Any]
    run: Callable[[], Any]
    reset: Callable[[], None]
    seconds: list[float]


def measure_latency(
    target: Target,
    config: LatencyConfig,
    drafters: Mapping[str, ParallelHeads] | None = None,
    report: Report | None = None,
) -> Measures:
    """Time everything; one JSON-able record with the environment. Drafters are timed for a single sequence."""
    drafters = drafters or {}
    _check_context(target, config)
    _check_memory(target, config)
    pairs = [(batch, context) for batch in config.batches for context in config.contexts]
    verify: list[Measures] = []
    draft: list[Measures] = []
    for place, (batch, context) in enumerate(pairs):
        cells = _cells(target, config, drafters, batch, context)

        def step(done: int, total: int, base: int = place, text: str = f"batch {batch}, context {context}") -> None:
            if report is not None:
                report(base * total + done, len(pairs) * total, text)

        _time(target, cells, config.rounds, step)
        timed = _merged(cells, _scale(target, config))
        verify += [row for row in timed if row["what"] == "verify"]
        draft += [row for row in timed if row["what"] in ("draft", "feed")]
    _add_ratios(verify)
    limits = measure_limits(target)
    _add_limits(verify, ForwardWork.of(target, config.num_layers), limits)
    return {
        "format": FORMAT,
        **_described(target, config, drafters),
        "limits": asdict(limits),
        "verify": verify,
        "draft": draft,
        "projection": project(verify, draft, dict(config.tau)),
        **provenance.record(),
    }


def project(verify: Sequence[Measures], draft: Sequence[Measures], tau: dict[int, float]) -> list[Measures]:
    """Per drafter, context and tree size at batch 1: the tau at which drafting breaks even; with an assumed tau, the
    projected speedup."""
    forwards = {(row["context"], row["nodes"]): row["ms"] for row in verify if row["batch"] == 1}
    rows = []
    for drafted in (row for row in draft if row["what"] == "draft"):
        context, nodes, name = drafted["context"], drafted["nodes"], drafted["drafter"]
        feed = next(
            row["ms"]
            for row in draft
            if (row["what"], row["drafter"], row["context"]) == ("feed", name, context) and row["rows"] == TYPICAL_FEED
        )
        cost = (forwards[context, nodes] + drafted["ms"] + feed) / forwards[context, 1]
        row = {"drafter": name, "context": context, "nodes": nodes, "break_even_tau": cost}
        if nodes in tau:
            row |= {"assumed_tau": tau[nodes], "projected_speedup": tau[nodes] / cost}
        rows.append(row)
    return rows


# -- what is timed ----------------------------------------------------------------------------------------------------


def _cells(
    target: Target, config: LatencyConfig, drafters: Mapping[str, ParallelHeads], batch: int, context: int
) -> list[Cell]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(target.spec.vocab_size, (context,), generator=generator).tolist()
    cache = target.new_cache()
    output = target.prefill(ids, cache)
    is_scaled = _scale(target, config) != 1
    if batch > 1:
        cache = _repeated(cache, batch)
    cells = []
    for nodes in config.nodes:
        tree = typical_tree(target.spec.vocab_size, nodes)
        key = {"batch": batch, "context": context, "nodes": nodes}
        run, reset = _forward(target, tree, cache, batch), _trim(cache, context)
        cells.append(Cell({"what": "verify", **key}, run, reset, []))
        if is_scaled:
            cells.append(
                Cell({"what": "rest", **key}, _forward_without_layers(target, tree, cache, batch, context), reset, [])
            )
    if batch == 1:
        for name, drafter in drafters.items():
            around = [captured(drafter, is_static=target.is_static) for _ in range(2)]
            cells += _drafter_cells(name, around, output.hidden, ids, config.nodes)
    return cells


def typical_tree(vocab_size: int, num_nodes: int) -> TokenTree:
    """A tree as calibrated heads grow it: accuracy falls by depth and rank.

    raises ConfigError for more nodes than there are tokens.
    """
    if num_nodes > vocab_size:
        raise ConfigError(f"a tree of {num_nodes} nodes was asked for, but the target has only {vocab_size} tokens")
    accuracy = [[0.6 * 0.8**depth * 0.5**rank for rank in range(num_nodes)] for depth in range(TREE_DEPTH)]
    tokens = [list(range(num_nodes)) for _ in range(TREE_DEPTH)]
    log_probs = [[0.0] * num_nodes] * TREE_DEPTH
    return build_template(accuracy, num_nodes).fill(0, Candidates(tokens, log_probs), TREE_DEPTH)


def _forward(target: Target, tree: TokenTree, cache: KVCache, batch: int) -> Callable[[], Any]:
    if batch == 1:
        return lambda: target.verify(tree, cache)
    return lambda: _run(target, tree, cache, batch, cache.num_committed)


def _run(target: Target, tree: TokenTree, cache: KVCache, batch: int, past: int) -> Any:
    """One tree and one context in every sequence."""
    positions = torch.tensor(tree.depths, device=target.device) + past
    layout = Layout.behind(past, tree.ancestor_mask().to(target.device), positions)
    ids = torch.tensor([tree.tokens], device=target.device).expand(batch, -1)
    return target.run(ids, layout, cache).logits


def _forward_without_layers(
    target: Target, tree: TokenTree, cache: KVCache, batch: int, context: int
) -> Callable[[], Any]:
    empty = KVCache(0)

    def run() -> Any:
        with without_layers(target):
            if batch == 1 and target.is_static:  # the same way as the forward it is taken from
                return target.verify(tree, cache)
            return _run(target, tree, empty, batch, context)

    return run


def _drafter_cells(
    name: str, drafters: Sequence[Drafter], hidden: torch.Tensor, ids: list[int], sizes: Sequence[int]
) -> list[Cell]:
    """drafters: the same one twice, so that what is asked and what is fed keep their places where those are fixed."""
    drafter, feeder = drafters
    context = len(ids)
    next_ids = torch.tensor([*ids[1:], 0], device=hidden.device)
    key = {"drafter": name, "context": context}
    ready, fed = drafter.start(), feeder.start()  # feeding is undone by a trim, after which no draft may follow
    drafter.commit(ready, hidden, next_ids)
    feeder.commit(fed, hidden, next_ids)
    cells = []
    for nodes in sizes:
        if nodes > 1:
            grower = DynamicGrower(nodes)

            def draft(grower: DynamicGrower = grower) -> TokenTree:
                candidates = drafter.draft(ready, grower.num_ranks, 0.0, grower.max_depth)
                return grower.grow(0, candidates, drafter.num_heads).tree

            cells.append(Cell({"what": "draft", **key, "nodes": nodes}, draft, _nothing, []))
    for rows in FED_ROWS:
        chunk = hidden[-1:].expand(rows, -1)

        def feed(chunk: torch.Tensor = chunk, rows: int = rows) -> None:
            feeder.commit(fed, chunk, next_ids[-1:].expand(rows))

        def undo() -> None:
            feeder.trim(fed, context)

        cells.append(Cell({"what": "feed", **key, "rows": rows}, feed, undo, []))
    return cells


def _repeated(cache: KVCache, batch: int) -> KVCache:
    """The rows of one sequence, for `batch` sequences that hold the same."""
    repeated = KVCache(len(cache.layers))
    repeated.num_committed = cache.num_committed
    for ours, theirs in zip(repeated.layers, cache.layers, strict=True):
        assert theirs.keys is not None and theirs.values is not None
        ours.keys = theirs.keys.expand(batch, -1, -1, -1).clone()
        ours.values = theirs.values.expand(batch, -1, -1, -1).clone()
        ours.num_rows = theirs.num_rows
    return repeated


def _trim(cache: KVCache, num_rows: int) -> Callable[[], None]:
    return lambda: cache.trim(num_rows)


def _nothing() -> None:
    return None


# -- the clock --------------------------------------------------------------------------------------------------------


def _time(target: Target, cells: list[Cell], rounds: int, step: Callable[[int, int], None]) -> None:
    """Round 0 warms up. Each round starts at another cell, so that none always follows the same neighbour."""
    for turn in range(rounds + 1):
        start = turn % len(cells)
        for cell in cells[start:] + cells[:start]:
            started = now(target)
            cell.run()
            seconds = now(target) - started
            cell.reset()
            if turn:
                cell.seconds.append(seconds)
        step(turn + 1, rounds + 1)


def _merged(cells: Sequence[Cell], scale: float) -> list[Measures]:
    """Milliseconds per cell; where layers are scaled, round by round with the forward that had none."""
    rest = {_place(cell.key): cell.seconds for cell in cells if cell.key["what"] == "rest"}
    rows = []
    for cell in cells:
        if cell.key["what"] == "rest":
            continue
        row = dict(cell.key)
        seconds = cell.seconds
        if cell.key["what"] == "verify" and scale != 1:
            without = rest[_place(cell.key)]
            row |= {"measured_ms": _milliseconds(seconds), "without_layers_ms": _milliseconds(without)}
            seconds = [base + scale * (whole - base) for whole, base in zip(seconds, without, strict=True)]
        row |= {"ms": _milliseconds(seconds), "ms_min": 1000 * min(seconds), "ms_max": 1000 * max(seconds)}
        rows.append(row)
    return rows


def _place(key: dict[str, Any]) -> tuple[int, int, int]:
    return key["batch"], key["context"], key["nodes"]


def _milliseconds(seconds: Sequence[float]) -> float:
    return 1000 * statistics.median(seconds)


def _add_ratios(verify: list[Measures]) -> None:
    """Cost of n nodes in forwards of one, at the same batch and context."""
    single = {(row["batch"], row["context"]): row["ms"] for row in verify if row["nodes"] == 1}
    for row in verify:
        row["ratio"] = row["ms"] / single[row["batch"], row["context"]]


def _add_limits(verify: list[Measures], work: ForwardWork, limits: Limits) -> None:
    """The least milliseconds each forward could take on this machine."""
    for row in verify:
        row["least_ms"] = work.least_ms(limits, batch=row["batch"], context=row["context"], nodes=row["nodes"])


# -- checks and words -------------------------------------------------------------------------------------------------


def _scale(target: Target, config: LatencyConfig) -> float:
    return 1 if config.num_layers is None else config.num_layers / target.spec.num_layers


def _check_context(target: Target, config: LatencyConfig) -> None:
    longest = max(config.contexts) + TREE_DEPTH
    if longest >= target.spec.max_positions:
        raise ConfigError(
            f"--contexts holds {max(config.contexts)}: with a tree behind it that is beyond the "
            f"{target.spec.max_positions} positions of {target.name}"
        )
    if config.num_layers is not None and config.num_layers < target.spec.num_layers:
        raise ConfigError(
            f"{config.num_layers} layers were asked for, but {target.name} holds {target.spec.num_layers}"
        )


def _check_memory(target: Target, config: LatencyConfig) -> None:
    """Raise ConfigError where the caches and logits of the largest cell do not fit."""
    spec, size = target.spec, target.dtype.itemsize
    row = 2 * spec.num_layers * spec.num_key_value_heads * spec.head_size * size
    nodes = max(config.nodes)
    per_sequence = (max(config.contexts) + nodes) * row + nodes * spec.vocab_size * size
    needed, free = (max(config.batches) + 1) * per_sequence, free_bytes(target.device)
    if needed > free:
        raise ConfigError(
            f"{max(config.batches)} sequences of {max(config.contexts)} rows with {nodes} nodes need "
            f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on {target.device}: give smaller --batches"
        )


def _described(target: Target, config: LatencyConfig, drafters: Mapping[str, ParallelHeads]) -> Measures:
    return {
        "target": target.name,
        "path": target.path,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "num_layers": config.num_layers or target.spec.num_layers,
        "measured_layers": target.spec.num_layers,
        "settings": json.loads(json.dumps(asdict(config))),  # lists, as it will be read back
        "drafters": {
            name: {
                "parameters": drafter.num_weights,
                "heads": drafter.num_heads,
                "draft_vocab": drafter.draft_vocab,
            }
            for name, drafter in drafters.items()
        },
    }


def _listed(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
