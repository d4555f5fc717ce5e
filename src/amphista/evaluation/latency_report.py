"""The tables and files of a latency record: latency.json for programs, latency.md and latency.svg for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from amphista.errors import ConfigError
from amphista.evaluation.cells import table
from amphista.evaluation.memory import GOAL
from amphista.evaluation.records import write_json
from amphista.evaluation.step_profile import GOAL_MS

JSON, MARKDOWN, PLOT = "latency.json", "latency.md", "latency.svg"
Measures = dict[str, Any]
PYTHON_LEGEND = (
    "Milliseconds of a mean decode step of one greedy answer, between its calls into torch: with the timer's own cost "
    f"taken off, of which in the target's forward, and at most (nothing taken off). Wanted: at most {GOAL_MS:g} ms.\n"
)
MEMORY_LEGEND = (
    "Peak of a process that loads, reads and decodes, less what it held after imports, over what decoding cannot do "
    f"without: weights, KV cache and drafter. Wanted: at most {GOAL:g}.\n"
)


def write_latency(folder: Path, record: Measures) -> None:
    """Write the record, its tables and, where matplotlib is installed, its plot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; give a folder with --out") from error
    write_json(folder / JSON, record)
    (folder / MARKDOWN).write_text(latency_markdown(record), encoding="utf-8")
    try:
        from amphista.evaluation.plots import latency_figure
    except ImportError:
        return
    (folder / PLOT).write_text(latency_figure(record), encoding="utf-8")


def latency_markdown(record: Measures) -> str:
    """A page: what was measured and where, forwards, drafting, projections."""
    machine = record["machine"]
    place = machine.get("accelerator") or machine["processor"]
    parts = [
        f"# Latency of {record['target']}\n",
        f"{record['path'].capitalize()} forward, {record['dtype']} on {place}, {machine['torch_threads']} threads; "
        f"medians of {record['settings']['rounds']} rounds; "
        f"torch {record['versions'].get('torch')}, transformers {record['versions'].get('transformers')}; "
        f"amphista {record['git'] or record['versions'].get('amphista')}.\n",
        latency_tables(record),
    ]
    return "\n".join(parts)


def latency_tables(record: Measures) -> str:
    """The tables alone."""
    parts = ["## One forward\n", _scaling_line(record), _forwards(record["verify"])]
    parts += [
        "\n## Against what the machine allows\n",
        _limits_line(record["limits"]),
        _against_limits(record["verify"]),
    ]
    if record["draft"]:
        parts += ["\n## Drafting, one sequence\n", _drafting(record)]
    if record.get("python"):
        parts += ["\n## Python between tensor operations, one sequence\n", PYTHON_LEGEND, _python(record["python"])]
    if record.get("memory"):
        parts += ["\n## Memory, one sequence\n", MEMORY_LEGEND, _memory(record["memory"])]
    if record["projection"]:
        parts += ["\n## What it would take (projected from the times above, not decoded)\n", _projection(record)]
    return "\n".join(part for part in parts if part) + "\n"


def is_scaled(record: Measures) -> bool:
    """Whether fewer layers were measured than the numbers stand for."""
    return bool(record["num_layers"] != record["measured_layers"])


def _scaling_line(record: Measures) -> str:
    if not is_scaled(record):
        return ""
    return (
        f"Scaled: {record['measured_layers']} distinct layers and the LM head were measured; the cost of the layers is "
        f"multiplied up to {record['num_layers']}. latency.json holds the measured times too.\n"
    )


def _limits_line(limits: Measures) -> str:
    return (
        f"Measured on the spot, the best of several kernels: {limits['bytes_per_second'] / 1e9:.1f} GB/s read"
        f"{_by(limits.get('read_by'))}, {limits['operations_per_second'] / 1e9:.0f} G operations/s"
        f"{_by(limits.get('computed_by'))}. The least time reads all weights and cached rows once, or does all "
        "products, whichever is longer; in parentheses, how many times that the forward took.\n"
    )


def _by(kernel: str | None) -> str:
    return f" ({kernel})" if kernel else ""


def _against_limits(verify: list[Measures]) -> str:
    """Milliseconds at the limit, and how many times that the forward took."""
    return _by_nodes(verify, lambda cell: f"{cell['least_ms']:.1f} ({cell['ms'] / cell['least_ms']:.1f}x)", "limit")


def _forwards(verify: list[Measures]) -> str:
    return _by_nodes(verify, lambda cell: f"{cell['ms']:.1f} ({cell['ratio']:.2f}x)")


def _by_nodes(verify: list[Measures], shown: Callable[[Measures], str], title: str = "") -> str:
    """One row per batch and context, one column per tree size."""
    sizes = sorted({row["nodes"] for row in verify})
    places = list(dict.fromkeys((row["batch"], row["context"]) for row in verify))
    found = {(row["batch"], row["context"], row["nodes"]): row for row in verify}
    rows = []
    for batch, context in places:
        row = [found[batch, context, nodes] for nodes in sizes]
        rows.append([str(batch), str(context), *map(shown, row)])
    names = [f"{nodes} node{'s' * (nodes > 1)}, {title + ' ' if title else ''}ms" for nodes in sizes]
    headers = ["batch", "context", *names]
    return table(headers, rows)


def _drafting(record: Measures) -> str:
    """One row per drafter and context: a draft for trees of each size, and feeding committed rows."""
    draft = record["draft"]
    sizes = sorted({row["nodes"] for row in draft if row["what"] == "draft"})
    fed = sorted({row["rows"] for row in draft if row["what"] == "feed"})
    times = {
        (row["drafter"], row["context"], row["what"], row.get("nodes", row.get("rows"))): row["ms"] for row in draft
    }
    rows = []
    for name, context in _places(draft):
        about = record["drafters"][name]
        size = f"{about['parameters'] / 1e6:.1f} M, scores {about['draft_vocab']} tokens"
        cells = [times[name, context, "draft", nodes] for nodes in sizes]
        cells += [times[name, context, "feed", count] for count in fed]
        rows.append([name, size, str(context), *(f"{ms:.2f}" for ms in cells)])
    headers = [f"draft {nodes} nodes, ms" for nodes in sizes]
    headers += [f"feed {count} row{'s' * (count > 1)}, ms" for count in fed]
    return table(["drafter", "size", "context", *headers], rows)


def _python(rows: list[Measures]) -> str:
    """One row per drafter."""
    keys = ("outside_ms", "forward_ms", "at_most_ms", "operations_ms")
    headers = [
        "drafter",
        "steps",
        "calls a step",
        "Python, ms",
        "in the forward",
        "at most",
        "under the timer: calls, ms",
    ]
    return table(
        headers,
        [
            [row["drafter"], str(row["num_steps"]), f"{row['calls']:.0f}", *(f"{row[key]:.2f}" for key in keys)]
            for row in rows
        ],
    )


def _memory(memory: list[Measures]) -> str:
    """One row per drafter: the peak of a process of its own, what it needs at least, and their ratio."""
    parts = ("imports", "peak", "weights", "cache", "drafter")
    rows = [
        [
            row["drafter"],
            row["settings"].get("dtype") or "default",
            str(row["tokens"]),
            *(f"{row[part + '_bytes'] / 1e6:.0f}" for part in parts),
            f"{row['overhead']:.2f}x",
        ]
        for row in memory
    ]
    headers = [
        "drafter",
        "dtype",
        "tokens",
        *(f"{part}, MB" for part in parts),
        "(peak - imports) / (weights + cache + drafter)",
    ]
    return table(headers, rows)


def _projection(record: Measures) -> str:
    """One row per drafter and context: the tau that pays by tree size; projected speedups where a tau is assumed."""
    found = {(row["drafter"], row["context"], row["nodes"]): row for row in record["projection"]}
    sizes = sorted({nodes for _, _, nodes in found})
    assumed = [size for size in sizes if any("assumed_tau" in row and row["nodes"] == size for row in found.values())]
    rows = []
    for name, context in _places(record["projection"]):
        cells = [f"{found[name, context, size]['break_even_tau']:.2f}" for size in sizes]
        cells += [f"{found[name, context, size]['projected_speedup']:.2f}x" for size in assumed]
        rows.append([name, str(context), *cells])
    headers = [f"{size} nodes pay above tau" for size in sizes]
    taus = dict(record["settings"]["tau"])
    headers += [f"projected speedup, {size} nodes at an assumed tau of {taus[size]:g}" for size in assumed]
    return table(["drafter", "context", *headers], rows)


def _places(rows: list[Measures]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row["drafter"], row["context"]) for row in rows))
