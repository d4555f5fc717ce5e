"""How long a target's forward takes over nodes, batch and context, how long drafting takes, and what follows from both.

    speedup ~ tau / ((T_verify(n) + T_draft(n) + T_feed) / T_verify(1))

T_verify(n): one forward over a tree of n nodes behind `context` committed rows, masks and positions included, the way
decoding does it. T_draft(n): the drafter's heads and the tree grown from them. T_feed: giving the drafter the rows of
two committed tokens. Not in it: accepting, committing, text. The tau at which drafting starts to pay needs no drafter
that was ever trained, so sizes nobody holds the weights of can be judged; whatever rests on it is called projected.

All cells of one context and batch are measured in turn, round after round (`engine/timing.py`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from amphista import provenance
from amphista.cache.static import KVCache
from amphista.drafter.base import Drafter
from amphista.drafter.captured import captured
from amphista.drafter.heads import ParallelHeads
from amphista.engine.timing import Cell, rounds
from amphista.errors import ConfigError
from amphista.evaluation.cells import pivot
from amphista.files import write_file, write_json
from amphista.target.shapes import free_bytes, without_layers
from amphista.target.spans import Span
from amphista.target.target import Target
from amphista.tree.build import build_template
from amphista.tree.candidates import Candidates
from amphista.tree.grow import DynamicGrower
from amphista.tree.token_tree import TokenTree

FORMAT = 3
JSON, MARKDOWN = "latency.json", "latency.md"
TREE_DEPTH = 5  # heads of the shipped drafters: a tree of many nodes is wide, not deep
FED_ROWS = (1, 2, 4)
TYPICAL_FEED = 2
SEED = 0
Report = Callable[[int, int, str], None]
Measures = dict[str, Any]
Keyed = tuple[Measures, Cell]  # what is timed, and its times


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """What is timed: every combination of `nodes` (root included), `contexts` (rows) and `batches` (sequences).

    rounds: timed repetitions of each, after one that is not timed. num_layers: the layers the numbers shall stand for;
    where the target holds fewer, the cost of its layers is scaled up to them.
    """

    nodes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (256,)
    batches: tuple[int, ...] = (1,)
    rounds: int = 7
    num_layers: int | None = None

    def __post_init__(self) -> None:
        for option, values in (("nodes", self.nodes), ("contexts", self.contexts), ("batches", self.batches)):
            if not values or min(values) < 1 or len(set(values)) != len(values):
                raise ConfigError(f"--{option} is {values}: expected distinct whole numbers of at least 1")
        if 1 not in self.nodes:
            raise ConfigError(f"--nodes is {self.nodes}: 1 must be among them, it is what others are compared to")
        if self.rounds < 1:
            raise ConfigError(f"--rounds is {self.rounds}: expected at least 1")


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
        keyed = _cells(target, config, drafters, batch, context)
        cells = [cell for _, cell in keyed]
        for cell in cells:
            cell.time(target.device)  # the first time is not like the others
        for done in rounds(cells, target.device):
            if report is not None:
                total = config.rounds
                report(place * total + done, len(pairs) * total, f"batch {batch}, context {context}")
            if done == config.rounds:
                break
        timed = _merged(keyed, _scale(target, config))
        verify += [row for row in timed if row["what"] == "verify"]
        draft += [row for row in timed if row["what"] in ("draft", "feed")]
    _add_ratios(verify)
    return {
        "format": FORMAT,
        **_described(target, config, drafters),
        "verify": verify,
        "draft": draft,
        "projection": project(verify, draft),
        **provenance.record(),
    }


def project(verify: Sequence[Measures], draft: Sequence[Measures]) -> list[Measures]:
    """The tau at which drafting breaks even, for each drafter, context and tree size at batch 1."""
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
        rows.append({"drafter": name, "context": context, "nodes": nodes, "break_even_tau": cost})
    return rows


# -- what is timed ----------------------------------------------------------------------------------------------------


def _cells(
    target: Target, config: LatencyConfig, drafters: Mapping[str, ParallelHeads], batch: int, context: int
) -> list[Keyed]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(target.spec.vocab_size, (context,), generator=generator).tolist()
    caches = [target.new_cache() for _ in range(batch)]
    output = target.prefill(ids, caches[0])
    for cache in caches[1:]:
        cache.take_copy(caches[0], context)
    cells: list[Keyed] = []

    def trim() -> None:
        for cache in caches:
            cache.trim(context)

    for nodes in config.nodes:
        tree = typical_tree(target.spec.vocab_size, nodes)
        key = {"batch": batch, "context": context, "nodes": nodes}
        cells.append(({"what": "verify", **key}, Cell(_forward(target, tree, caches), trim)))
        if _scale(target, config) != 1:
            rest = _forward_without_layers(target, tree, caches)
            cells.append(({"what": "rest", **key}, Cell(rest, trim)))
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


def _forward(target: Target, tree: TokenTree, caches: Sequence[KVCache]) -> Callable[[], Any]:
    """One tree and one context in every sequence."""
    spans = [Span(tree, cache) for cache in caches]
    return lambda: target.forward(spans)


def _forward_without_layers(target: Target, tree: TokenTree, caches: Sequence[KVCache]) -> Callable[[], Any]:
    is_replayed = len(caches) == 1 and target.is_static  # the same way as the forward it is taken from
    empty = [KVCache(0) for _ in caches]
    for cache, like in zip(empty, caches, strict=True):
        cache.num_committed = like.num_committed
    forward = _forward(target, tree, caches if is_replayed else empty)

    def run() -> Any:
        with without_layers(target):
            return forward()

    return run


def _drafter_cells(
    name: str, drafters: Sequence[Drafter], hidden: torch.Tensor, ids: list[int], sizes: Sequence[int]
) -> list[Keyed]:
    """drafters: the same one twice, so that what is asked and what is fed keep their places where those are fixed."""
    drafter, feeder = drafters
    context = len(ids)
    next_ids = torch.tensor([*ids[1:], 0], device=hidden.device)
    key = {"drafter": name, "context": context}
    ready, fed = drafter.start(), feeder.start()  # feeding is undone by a trim, after which no draft may follow
    drafter.commit(ready, hidden, next_ids)
    feeder.commit(fed, hidden, next_ids)
    cells: list[Keyed] = []
    for nodes in sizes:
        if nodes > 1:
            grower = DynamicGrower(nodes)

            def draft(grower: DynamicGrower = grower) -> TokenTree:
                candidates = drafter.draft(ready, grower.num_ranks, 0.0, grower.max_depth)
                return grower.grow(0, candidates, drafter.num_heads).tree

            cells.append(({"what": "draft", **key, "nodes": nodes}, Cell(draft)))
    for rows in FED_ROWS:
        chunk = hidden[-1:].expand(rows, -1)

        def feed(chunk: torch.Tensor = chunk, rows: int = rows) -> None:
            feeder.commit(fed, chunk, next_ids[-1:].expand(rows))

        def undo() -> None:
            feeder.trim(fed, context)

        cells.append(({"what": "feed", **key, "rows": rows}, Cell(feed, undo)))
    return cells


# -- from seconds to rows ---------------------------------------------------------------------------------------------


def _merged(cells: Sequence[Keyed], scale: float) -> list[Measures]:
    """Milliseconds per cell; where layers are scaled, round by round with the forward that had none."""
    rest = {_place(key): cell.seconds for key, cell in cells if key["what"] == "rest"}
    rows = []
    for key, cell in cells:
        if key["what"] == "rest":
            continue
        row = dict(key)
        seconds = cell.seconds
        if key["what"] == "verify" and scale != 1:
            without = rest[_place(key)]
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
        "dtype": target.type_name,
        "device": str(target.device),
        "num_layers": config.num_layers or target.spec.num_layers,
        "measured_layers": target.spec.num_layers,
        "settings": json.loads(json.dumps(asdict(config))),  # lists, as it will be read back
        "drafters": {
            name: {"parameters": drafter.num_weights, "heads": drafter.num_heads, "draft_vocab": drafter.draft_vocab}
            for name, drafter in drafters.items()
        },
    }


# -- files and tables -------------------------------------------------------------------------------------------------


def write_latency(folder: Path, record: Measures) -> None:
    """Write the record and its page."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; give a folder with --out") from error
    write_json(folder / JSON, record)
    write_file(folder / MARKDOWN, latency_markdown(record))


def latency_markdown(record: Measures) -> str:
    """A page: what was measured and where, then the tables."""
    machine, versions = record["machine"], record["versions"]
    return (
        f"# Latency of {record['target']}\n\n"
        f"{record['path'].capitalize()} forward, {record['dtype']} on "
        f"{machine.get('accelerator') or machine['processor']}, {machine['torch_threads']} threads; "
        f"medians of {record['settings']['rounds']} rounds; torch {versions.get('torch')}, transformers "
        f"{versions.get('transformers')}; amphista {record['git'] or versions.get('amphista')}.\n\n"
        f"{latency_tables(record)}"
    )


def latency_tables(record: Measures) -> str:
    """Forwards, drafting, and from which tau on it pays."""
    parts = ["## One forward, ms"]
    if record["num_layers"] != record["measured_layers"]:
        parts.append(
            f"Scaled: {record['measured_layers']} distinct layers and the LM head were measured; the cost of the "
            f"layers is multiplied up to {record['num_layers']}. {JSON} holds the measured times too."
        )
    parts.append(
        pivot(record["verify"], ("batch", "context"), _nodes, lambda row: f"{row['ms']:.1f} ({row['ratio']:.2f}x)")
    )
    if record["draft"]:
        parts.append("## Drafting, one sequence, ms")
        parts += [
            f"{name}: {about['parameters'] / 1e6:.1f} M weights, scores {about['draft_vocab']} tokens."
            for name, about in record["drafters"].items()
        ]
        parts.append(pivot(record["draft"], ("drafter", "context"), _drafted, lambda row: f"{row['ms']:.2f}"))
    if record["projection"]:
        parts.append("## Tau above which a tree pays (projected from the times above, not decoded)")
        parts.append(
            pivot(record["projection"], ("drafter", "context"), _nodes, lambda row: f"{row['break_even_tau']:.2f}")
        )
    return "\n\n".join(parts) + "\n"


def _nodes(row: Measures) -> str:
    return f"{row['nodes']} node{'s' * (row['nodes'] > 1)}"


def _drafted(row: Measures) -> str:
    return f"draft {_nodes(row)}" if row["what"] == "draft" else f"feed {row['rows']} row{'s' * (row['rows'] > 1)}"
