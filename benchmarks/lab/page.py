"""One page from a folder of runs: what is wanted beside what was measured, then every part's tables.

Parts are the folders in it that `amphista evaluate` or `benchmarks.lab latency` have written; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amphista.errors import DataError
from amphista.evaluation.cells import pivot, table, times
from amphista.evaluation.latency import JSON, latency_markdown
from amphista.evaluation.metrics import ALL
from amphista.evaluation.records import Record, read_records
from amphista.evaluation.report import markdown
from amphista.evaluation.summary import RECORDS, RUN, build_summary
from amphista.files import read_json, write_file
from benchmarks.lab.efficiency import efficiencies
from benchmarks.lab.speed_tables import around_verify, phases_ms, speed_markdown

SHARE_GOAL = 0.93  # of the possible speedup is realised, at least
OVERHEAD_GOAL = 0.25  # of a step lies around the target's forward, at most
PYTHON_GOAL_MS = 2.0  # of a step lies between tensor operations, at most
MEMORY_GOAL = 1.3  # times what decoding cannot do without, at most
REPORT = "report.md"
LEGEND = (
    "Each part below has a folder of its own here, with figures. Whether a goal is met is judged by the measured "
    "value, not by its interval (in parentheses). Machines are shared: a figure measured once is not yet known."
)
HEADERS = ["part", "what", "of", "wanted", "measured", "met"]
PYTHON_LEGEND = (
    "Milliseconds of a mean decode step of one greedy answer, between its calls into torch: with the timer's own cost "
    "taken off, of which in the target's forward, and at most (nothing taken off)."
)
MEMORY_LEGEND = (
    "MB. Peak of a process that loads, reads and decodes, less what it held after imports, over what decoding cannot "
    "do without: weights, KV cache and drafter."
)
Row = list[str]


def write_page(folder: Path) -> str:
    """Write the page, DIR/report.md; returns its table of goals. raises DataError where no part is found."""
    runs = [(path.parent.name, read_json(path), read_records(path.parent / RECORDS)) for path in _found(folder, RUN)]
    latencies = [(path.parent.name, read_json(path)) for path in _found(folder, JSON)]
    if not runs and not latencies:
        raise DataError(f"{folder} holds no folders with {RUN} or {JSON}: expected one of several --out folders")
    rows = [row for part, run, records in runs for row in run_goals(part, run, records)]
    rows += [row for part, record in latencies for row in latency_goals(part, record)]
    goals = table(HEADERS, rows)
    parts = [
        f"# {part}: {markdown(build_summary(run, records, [])).removeprefix('# ')}\n{speed_markdown(run, records)}"
        for part, run, records in runs
    ]
    parts += [
        f"# {part}: {latency_markdown(record).removeprefix('# ')}\n{machine_tables(record)}"
        for part, record in latencies
    ]
    text = "\n\n".join([f"# What is wanted, what was measured\n\n{LEGEND}\n\n{goals}", *map(_lowered, parts)]) + "\n"
    write_file(folder / REPORT, text)
    return goals


def run_goals(part: str, run: dict[str, Any], records: Sequence[Record]) -> Iterator[Row]:
    """Losslessness, failures, realised against possible speed, time around the forward; speed over stock as it is."""
    measures = build_summary(run, records, [])["measures"][ALL]
    for name, m in measures.items():
        yield _row(part, "failed answers", name, "0", str(m["failed"]), m["failed"] == 0)
        if name != "none" and m["compared"]:
            yield _row(part, "same tokens as none", name, "100%", f"{m['identical']:.1%}", m["identical"] == 1)
    if measures.get("none", {}).get("speedup_hf"):
        yield _row(part, "plain decoding over HF generate", "none", "", times(measures["none"]["speedup_hf"]), None)
    for name, found in efficiencies(records, run.get("costs", {})).items():
        low, high = found["share_interval"]
        told = f"{found['share']:.2f} ({low:.2f} to {high:.2f})"
        met = found["share"] >= SHARE_GOAL
        yield _row(part, "realised / possible speedup", name, f"at least {SHARE_GOAL}", told, met)
    for name in measures:
        share = around_verify(phases_ms(records, name))
        if share is not None:
            wanted = f"at most {OVERHEAD_GOAL:.0%}"
            yield _row(part, "draft + tree + accept + commit", name, wanted, f"{share:.1%}", share <= OVERHEAD_GOAL)


def latency_goals(part: str, record: dict[str, Any]) -> Iterator[Row]:
    """A plain forward against the machine as it is; Python, memory."""
    for row in record["verify"]:
        if row["nodes"] == 1 and "least_ms" in row:
            told = times(row["ms"] / row["least_ms"])
            yield _row(part, "forward of 1 row over its limit", f"context {row['context']}", "", told, None)
    for row in record.get("python", []):
        wanted, told = f"at most {PYTHON_GOAL_MS:g} ms", f"{row['outside_ms']:.2f} ms"
        met = row["outside_ms"] <= PYTHON_GOAL_MS
        yield _row(part, "Python between operations, a step", row["drafter"], wanted, told, met)
    for row in record.get("memory", []):
        wanted, told = f"at most {MEMORY_GOAL:g}x", times(row["overhead"])
        who = f"{row['drafter']}, {_dtype(row, record)}"
        yield _row(part, "peak memory over what is needed", who, wanted, told, row["overhead"] <= MEMORY_GOAL)


def machine_tables(record: dict[str, Any]) -> str:
    """Forwards against what the machine allows, Python between operations, memory: what of them was measured."""
    parts: list[str] = []
    if "limits" in record:
        limits = record["limits"]
        parts += [
            "## Against what the machine allows, ms",
            f"Measured on the spot, the best of several kernels: {limits['bytes_per_second'] / 1e9:.1f} GB/s read "
            f"({limits['read_by']}), {limits['operations_per_second'] / 1e9:.0f} G operations/s "
            f"({limits['computed_by']}). The least time reads all weights and cached rows once, or does all products, "
            "whichever is longer; in parentheses, how many times that the forward took.",
            pivot(
                record["verify"],
                ("context",),
                lambda row: f"{row['nodes']} nodes",
                lambda row: f"{row['least_ms']:.1f} ({row['ms'] / row['least_ms']:.1f}x)",
            ),
        ]
    if record.get("python"):
        keys = ("num_steps", "calls", "outside_ms", "forward_ms", "at_most_ms", "operations_ms")
        headers = ["drafter", "steps", "calls a step", "Python", "in the forward", "at most", "calls, under the timer"]
        rows = [[row["drafter"], *(f"{row[key]:.4g}" for key in keys)] for row in record["python"]]
        parts += ["## Python between tensor operations, one sequence", PYTHON_LEGEND, table(headers, rows)]
    if record.get("memory"):
        sizes = ("imports", "peak", "weights", "cache", "drafter")
        rows = [
            [row["drafter"], _dtype(row, record), str(row["tokens"])]
            + [f"{row[f'{size}_bytes'] / 1e6:.0f}" for size in sizes]
            + [times(row["overhead"])]
            for row in record["memory"]
        ]
        headers = ["drafter", "dtype", "tokens", *sizes, "overhead"]
        parts += ["## Memory, one sequence", MEMORY_LEGEND, table(headers, rows)]
    return "\n\n".join(parts) + "\n"


def _dtype(row: dict[str, Any], record: dict[str, Any]) -> str:
    return str(row["settings"].get("dtype") or record["dtype"])


def _row(part: str, what: str, who: str, wanted: str, measured: str, met: bool | None) -> Row:
    return [part, what, who, wanted, measured, "" if met is None else "yes" if met else "NO"]


def _found(folder: Path, file: str) -> list[Path]:
    """That file in every folder of the folder."""
    return sorted(folder.glob(f"*/{file}"))


def _lowered(text: str) -> str:
    """Headings one level down: a part is a chapter."""
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines())
