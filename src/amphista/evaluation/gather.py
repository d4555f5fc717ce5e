"""One page from a folder of runs: what is wanted beside what was measured, then every part's tables.

Parts are the folders in it that `amphista evaluate` or `amphista dev latency` have written; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amphista.errors import DataError
from amphista.evaluation import memory, step_profile
from amphista.evaluation.cells import table, times
from amphista.evaluation.efficiency import GOAL
from amphista.evaluation.latency_report import JSON, latency_markdown
from amphista.evaluation.metrics import ALL
from amphista.evaluation.records import read_json
from amphista.evaluation.report import markdown
from amphista.evaluation.speed_tables import OVERHEAD, OVERHEAD_GOAL
from amphista.evaluation.summary import RUN, SUMMARY

REPORT = "report.md"
LEGEND = (
    "Each part below has a folder of its own here, with figures. Whether a goal is met is judged by the measured "
    "value, not by its interval (in parentheses). Machines are shared: a figure measured once is not yet known."
)
HEADERS = ["part", "what", "of", "wanted", "measured", "met"]
Row = list[str]
Part = tuple[str, dict[str, Any]]


def gather(folder: Path) -> str:
    """Write the page, DIR/report.md; returns its table of goals. raises DataError where no part is found."""
    runs, latencies = _parts(folder, SUMMARY), _parts(folder, JSON)
    if not runs and not latencies:
        raise DataError(f"{folder} holds neither {RUN} nor folders of runs: expected an --out folder or one of several")
    rows = [row for name, summary in runs for row in run_goals(name, summary)]
    rows += [row for name, record in latencies for row in latency_goals(name, record)]
    goals = table(HEADERS, rows)
    parts = [markdown(summary).replace("# ", f"# {name}: ", 1) for name, summary in runs]
    parts += [latency_markdown(record).replace("# ", f"# {name}: ", 1) for name, record in latencies]
    text = "\n\n".join([f"# What is wanted, what was measured\n\n{LEGEND}\n\n{goals}", *map(_lowered, parts)]) + "\n"
    (folder / REPORT).write_text(text, encoding="utf-8")
    return goals


def run_goals(part: str, summary: dict[str, Any]) -> Iterator[Row]:
    """Losslessness, failures, realised against possible speed, time around the forward; speed over stock as it is."""
    sampled = summary["run"]["settings"]["params"]["temperature"] > 0
    for name, m in summary["measures"][ALL].items():
        yield _row(part, "failed answers", name, "0", str(m["failed"]), m["failed"] == 0)
        stock_noise = sampled and name.startswith("hf")
        if name != "none" and m["identical"] is not None and not stock_noise:
            yield _row(part, "same tokens as none", name, "100%", f"{m['identical']:.1%}", m["identical"] == 1)
    plain = summary["measures"][ALL].get("none", {})
    if plain.get("speedup_hf"):
        yield _row(part, "plain decoding over HF generate", "none", "", times(plain["speedup_hf"]), None)
    for name, found in summary.get("efficiency", {}).items():
        low, high = found["share_interval"]
        told = f"{found['share']:.2f} ({low:.2f} to {high:.2f})"
        yield _row(part, "realised / possible speedup", name, f"at least {GOAL}", told, found["share"] >= GOAL)
    for name, m in summary["measures"][ALL].items():
        if "verify" in m["phase_seconds"] and m.get("ms_per_step"):
            around = sum(m["phase_seconds"].get(phase, 0.0) for phase in OVERHEAD)
            share = 1000 * around / m["num_steps"] / m["ms_per_step"]
            wanted = f"at most {OVERHEAD_GOAL:.0%}"
            yield _row(part, "draft + tree + accept + commit", name, wanted, f"{share:.1%}", share <= OVERHEAD_GOAL)


def latency_goals(part: str, record: dict[str, Any]) -> Iterator[Row]:
    """A plain forward against the machine as it is; Python, memory."""
    for row in record["verify"]:
        if row["nodes"] == 1 and row["batch"] == 1:
            told = times(row["ms"] / row["least_ms"])
            yield _row(part, "forward of 1 row over its limit", f"context {row['context']}", "", told, None)
    for row in record.get("python", []):
        wanted, told = f"at most {step_profile.GOAL_MS:g} ms", f"{row['outside_ms']:.2f} ms"
        met = row["outside_ms"] <= step_profile.GOAL_MS
        yield _row(part, "Python between operations, a step", row["drafter"], wanted, told, met)
    for row in record.get("memory", []):
        who = f"{row['drafter']}, {row['settings'].get('dtype') or record['dtype']}"
        met = row["overhead"] <= memory.GOAL
        yield _row(
            part, "peak memory over what is needed", who, f"at most {memory.GOAL:g}x", times(row["overhead"]), met
        )


def _row(part: str, what: str, who: str, wanted: str, measured: str, met: bool | None) -> Row:
    return [part, what, who, wanted, measured, "" if met is None else "yes" if met else "NO"]


def _parts(folder: Path, file: str) -> list[Part]:
    """(name, record) of every folder in it that holds the file."""
    return [(path.parent.name, read_json(path)) for path in sorted(folder.glob(f"*/{file}"))]


def _lowered(text: str) -> str:
    """Headings one level down: a part is a chapter."""
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines())
