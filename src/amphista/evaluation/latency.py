"""How long a target's forward takes over nodes and context, how long drafting takes, and what follows from both.

    speedup ~ tau / ((T_verify(n) + T_draft(n) + T_feed) / T_verify(1))

T_verify(n): one forward over a tree of n nodes behind `context` committed rows, masks and positions included, the way
decoding does it. T_draft(n): the drafter's heads and the tree grown from them. T_feed: giving the drafter the rows of
two committed tokens. Not in it: accepting, committing, text. Whatever rests on the formula is called projected.

All cells of one context are measured in turn, round after round (`engine/timing.py`).
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
from amphista.drafter.base import Ask, Drafter
from amphista.drafter.captured_drafter import captured
from amphista.drafter.scoring import ScoringDrafter
from amphista.engine.timing import Cell, rounds
from amphista.errors import ConfigError
from amphista.evaluation.cells import pivot
from amphista.files import write_file, write_json
from amphista.target.target import Target
from amphista.tree.build import build_template
from amphista.tree.candidates import Candidates
from amphista.tree.grow import DynamicGrower
from amphista.tree.token_tree import TokenTree

FORMAT = 4
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
    """What is timed for one sequence: every combination of `nodes` (root included) and `contexts` (rows).

    rounds: timed repetitions of each, after one that is not timed.
    """

    nodes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (256,)
    rounds: int = 7

    def __post_init__(self) -> None:
        for option, values in (("nodes", self.nodes), ("contexts", self.contexts)):
            if not values or min(values) < 1 or len(set(values)) != len(values):
                raise ConfigError(f"--{option} is {values}: expected distinct whole numbers of at least 1")
        if 1 not in self.nodes:
            raise ConfigError(f"--nodes is {self.nodes}: 1 must be among them, it is what others are compared to")
        if self.rounds < 1:
            raise ConfigError(f"--rounds is {self.rounds}: expected at least 1")


def measure_latency(
    target: Target,
    config: LatencyConfig,
    drafters: Mapping[str, ScoringDrafter] | None = None,
    report: Report | None = None,
) -> Measures:
    """Time everything; one JSON-able record with the environment. raises ConfigError for a context that is too long."""
    drafters = drafters or {}
    longest = max(config.contexts)
    if longest + TREE_DEPTH >= target.spec.max_positions:
        raise ConfigError(
            f"--contexts holds {longest}: with a tree behind it that is beyond the "
            f"{target.spec.max_positions} positions of {target.name}"
        )
    rows: list[Measures] = []
    total = len(config.contexts) * config.rounds
    for place, context in enumerate(config.contexts):
        keyed = _cells(target, config, drafters, context)
        cells = [cell for _, cell in keyed]
        for cell in cells:
            cell.time(target.device)  # the first time is not like the others
        for done in rounds(cells, target.device):
            if report is not None:
                report(place * config.rounds + done, total, f"context {context}")
            if done == config.rounds:
                break
        rows += [_row(key, cell.seconds) for key, cell in keyed]
    verify = [row for row in rows if row["what"] == "verify"]
    draft = [row for row in rows if row["what"] != "verify"]
    return {
        "format": FORMAT,
        **_described(target, config, drafters),
        "verify": verify,
        "draft": draft,
        **derived(verify, draft),
        **provenance.record(),
    }


def _row(key: Measures, seconds: Sequence[float]) -> Measures:
    return {
        **key,
        "ms": 1000 * statistics.median(seconds),
        "ms_min": 1000 * min(seconds),
        "ms_max": 1000 * max(seconds),
    }


def derived(verify: Sequence[Measures], draft: Sequence[Measures]) -> Measures:
    """Give each forward its `ratio` to one of a single row; `projection`: the tau at which each draft breaks even."""
    forwards = {(row["context"], row["nodes"]): row["ms"] for row in verify}
    for row in verify:
        row["ratio"] = row["ms"] / forwards[row["context"], 1]
    feeds = {(r["drafter"], r["context"]): r["ms"] for r in draft if r["what"] == "feed" and r["rows"] == TYPICAL_FEED}
    projection = []
    for drafted in (row for row in draft if row["what"] == "draft"):
        name, context, nodes = drafted["drafter"], drafted["context"], drafted["nodes"]
        cost = forwards[context, nodes] + drafted["ms"] + feeds[name, context]
        tau = cost / forwards[context, 1]
        projection.append({"drafter": name, "context": context, "nodes": nodes, "break_even_tau": tau})
    return {"projection": projection}


# -- what is timed ----------------------------------------------------------------------------------------------------


def _cells(target: Target, config: LatencyConfig, drafters: Mapping[str, ScoringDrafter], context: int) -> list[Keyed]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(target.spec.vocab_size, (context,), generator=generator).tolist()
    cache = target.new_cache()
    target.prefill(ids, cache)
    cells: list[Keyed] = []
    for nodes in config.nodes:
        tree = typical_tree(target.spec.vocab_size, nodes)

        def verify(tree: TokenTree = tree) -> object:
            return target.verify(tree, cache)

        key = {"what": "verify", "context": context, "nodes": nodes}
        cells.append((key, Cell(verify, lambda: cache.trim(context))))
    for name, drafter in drafters.items():
        around = [captured(drafter, is_static=target.is_static) for _ in range(2)]
        hidden = target.prefill(ids, target.new_cache(), drafter.taps).hidden
        cells += _drafter_cells(name, around, (ids, cache, hidden), config.nodes)
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


def _drafter_cells(
    name: str, drafters: Sequence[Drafter], read: tuple[list[int], KVCache, torch.Tensor], sizes: Sequence[int]
) -> list[Keyed]:
    """drafters: the same one twice, so that what is asked and what is fed keep their places where those are fixed.
    read: a text, the target's cache of it, and its hidden states."""
    (ids, cache, hidden), (drafter, feeder) = read, drafters
    context = len(ids)
    next_ids = torch.tensor([*ids[1:], 0], device=hidden.device)
    key = {"drafter": name, "context": context}
    ready, fed = drafter.start(), feeder.start()  # feeding is undone by a trim, after which no draft may follow
    ready.target_cache = cache
    probed = None if drafter.probes is None else hidden[-1:].expand(drafter.probes.num_rows, -1)
    drafter.commit_all([Ask(ready, 0, hidden, next_ids.tolist(), probed)])
    feeder.commit(fed, hidden, next_ids)
    cells: list[Keyed] = []
    for nodes in sizes:
        if nodes > 1:
            grower = DynamicGrower(nodes)

            def draft(grower: DynamicGrower = grower) -> TokenTree:
                candidates = drafter.draft(ready, grower.num_ranks, grower.max_depth)
                return grower.grow(0, candidates, drafter.num_heads).tree

            cells.append(({"what": "draft", **key, "nodes": nodes}, Cell(draft)))
    for rows in FED_ROWS:
        chunk = hidden[-1:].expand(rows, -1)

        def feed(chunk: torch.Tensor = chunk, rows: int = rows) -> None:
            feeder.commit(fed, chunk, next_ids[-1:].expand(rows))

        cells.append(({"what": "feed", **key, "rows": rows}, Cell(feed, lambda: feeder.trim(fed, context))))
    return cells


def _described(target: Target, config: LatencyConfig, drafters: Mapping[str, ScoringDrafter]) -> Measures:
    return {
        "target": target.name,
        "path": target.path,
        "dtype": target.type_name,
        "device": str(target.device),
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
    forwards = pivot(record["verify"], ("context",), _nodes, lambda row: f"{row['ms']:.1f} ({row['ratio']:.2f}x)")
    parts = ["## One forward, ms", forwards]
    if record["draft"]:
        parts.append("## Drafting, ms")
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
