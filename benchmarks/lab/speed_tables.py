"""The tables of a run that say where its speed comes from and goes: phases, what was possible, growing answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amphista.evaluation.cells import DASH, number, table, times, with_interval
from amphista.evaluation.metrics import ALL, per_step, summarise
from amphista.evaluation.records import Record
from benchmarks.lab.efficiency import efficiencies
from benchmarks.lab.stretches import stretches

Rows = tuple[list[str], list[list[str]]]  # headers and rows of a table
STEP_PHASES = ("draft", "tree", "verify", "accept", "commit")
AROUND_VERIFY = ("draft", "tree", "accept", "commit")

PHASES_LEGEND = (
    "Milliseconds of a decode step (prefill: of an answer), all questions. draft: asking the heads, feeding them, "
    "looking up; tree: growing it; verify: the target's forward; between: what is in no phase. around verify: draft, "
    "tree, accept and commit together. Stock methods are timed whole."
)
EFFICIENCY_LEGEND = (
    "possible = tau / ((T(n) + T_draft) / T(1)), with the costs measured before the run, each step by its own tree and "
    "whether heads were asked. realised: decode speedup. The rest is in plain steps (a step of none): what a step "
    "should and did take, and where the difference is: drafting with growing the tree; verify, accept and commit; "
    "between the phases."
)
STRETCH_LEGEND = (
    "Steps by the tokens of the answer that stood before them. looping: share of the tokens behind the place where an "
    "answer began to loop; loops are easily drafted. speedup: over none in the same stretch of the same answers."
)
DRAFTING_LEGEND = (
    "nodes: rows of a target forward, root included. plain steps: without any draft. heads asked: share of steps."
)


def speed_markdown(run: dict[str, Any], records: Sequence[Record]) -> str:
    """Every table that has rows."""
    methods = list(run["settings"]["methods"])
    sections = [
        ("Time by phase", PHASES_LEGEND, phase_rows(records, methods)),
        ("Realised and possible", EFFICIENCY_LEGEND, efficiency_rows(efficiencies(records, run.get("costs", {})))),
        ("As the answer grows", STRETCH_LEGEND, stretch_rows(stretches(records, methods))),
        ("Drafting by task", DRAFTING_LEGEND, drafting_rows(records, methods)),
    ]
    return "\n".join(
        f"## {heading}\n\n{legend}\n\n{table(headers, rows)}\n" for heading, legend, (headers, rows) in sections if rows
    )


def phases_ms(records: Sequence[Record], method: str) -> dict[str, float]:
    """Milliseconds of a mean decode step by phase, as `step` whole, and of a mean prefill; empty without a step."""
    mine = [record for record in records if record.method == method and not record.failed]
    steps = sum(len(record.accepted) for record in mine)
    if not steps:
        return {}
    names = {name for record in mine for name in record.phase_seconds} - {"prefill"}
    found = {name: 1000 * sum(r.phase_seconds.get(name, 0.0) for r in mine) / steps for name in names}
    found["step"] = 1000 * sum(record.decode_seconds for record in mine) / steps
    return found | {"prefill": 1000 * sum(record.phase_seconds.get("prefill", 0.0) for record in mine) / len(mine)}


def around_verify(phases: dict[str, float]) -> float | None:
    """The share of a step that is drafting, growing, accepting and committing; None where phases are not told."""
    return sum(phases.get(name, 0.0) for name in AROUND_VERIFY) / phases["step"] if "verify" in phases else None


def phase_rows(records: Sequence[Record], methods: Sequence[str]) -> Rows:
    """One row a method."""
    headers = ["method", "prefill", "step", *STEP_PHASES, "between", "around verify"]
    rows = []
    for name in methods:
        phases = phases_ms(records, name)
        if phases:
            around = around_verify(phases)
            between = None if around is None else phases["step"] - sum(phases.get(phase, 0.0) for phase in STEP_PHASES)
            cells = [f"{phases['prefill']:.1f}", f"{phases['step']:.2f}"]
            cells += [number(phases.get(phase)) for phase in STEP_PHASES]
            rows.append([name, *cells, number(between), number(around, ".1%")])
    return headers, rows


def efficiency_rows(found: dict[str, dict[str, Any]]) -> Rows:
    """What was possible, what became of it, where the difference is."""
    headers = ["method", "possible", "realised", "realised / possible", "step should take", "step took"]
    headers += ["lost in drafting", "in forwards", "between"]
    rows = [
        [
            name,
            times(e["promised"]),
            with_interval(e, "realised"),
            with_interval(e, "share", unit=""),
            number(e["promised_step"]),
            number(e["step"]),
            *(number(e[f"lost_{part}"], "+.3f") for part in ("drafting", "forwards", "between")),
        ]
        for name, e in found.items()
    ]
    return headers, rows


def stretch_rows(found: list[dict[str, Any]]) -> Rows:
    """One row a method and stretch."""
    headers = ["method", "tokens", "answers", "ms a step", "tokens/s", "tau", "nodes", "speedup", "looping"]
    rows = [
        [
            s["method"],
            f"{s['start']} to {s['end']}",
            str(s["num_answers"]),
            number(s["ms_per_step"]),
            number(s["tokens_per_second"], ".1f"),
            number(s["tau"]),
            number(s["mean_tree_nodes"]),
            with_interval(s, "speedup"),
            f"{s['looping']:.0%}",
        ]
        for s in found
    ]
    return headers, rows


def drafting_rows(records: Sequence[Record], methods: Sequence[str]) -> Rows:
    """One row a drafting method and task, all questions last; a single task is all questions."""
    headers = ["method", "task", "tau", "expected tau", "decode speedup", "nodes", "plain steps", "heads asked"]
    measures = summarise(records, methods)
    tasks = [task for task in measures if task != ALL]
    rows = []
    for name in methods:
        for task in [*(tasks if len(tasks) > 1 else []), ALL]:
            mine = [r for r in records if r.method == name and not r.failed and task in (r.task, ALL)]
            if any(nodes > 1 for record in mine for nodes in record.tree_nodes):
                m = measures[task][name]
                told = [with_interval(m, "tau", unit=""), number(m["expected_tau"]), with_interval(m, "decode_speedup")]
                rows.append([name, task, *told, *_shares(mine)])
    return headers, rows


def _shares(records: Sequence[Record]) -> list[str]:
    """Nodes a step, plain steps, steps in which heads were asked (older records do not tell)."""
    nodes = per_step(records, lambda record: sum(record.tree_nodes))
    plain = per_step(records, lambda record: record.tree_nodes.count(1))
    cells = [_with_interval(nodes, ".1f"), _with_interval(plain, ".0%")]
    if all(len(record.drafted) == len(record.accepted) for record in records):
        return [*cells, _with_interval(per_step(records, lambda record: sum(record.drafted)), ".0%")]
    return [*cells, DASH]


def _with_interval(measured: tuple[float | None, Any], form: str) -> str:
    return with_interval({"it": measured[0], "it_interval": measured[1]}, "it", form, "")
