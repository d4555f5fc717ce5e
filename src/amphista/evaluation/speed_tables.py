"""The tables of a run that say where its speed comes from and goes: phases, what was possible, tau, growing answers."""

from __future__ import annotations

from typing import Any

from amphista.evaluation.cells import DASH, number, times, with_interval
from amphista.evaluation.curve import BINS, by_tau
from amphista.evaluation.efficiency import GOAL
from amphista.evaluation.metrics import ALL

Summary = dict[str, Any]
Section = tuple[str, str, list[str], list[list[str]]]  # heading, legend, headers, rows
STEP_PHASES = ("draft", "tree", "verify", "accept", "commit")
OVERHEAD = ("draft", "tree", "accept", "commit")
OVERHEAD_GOAL = 0.25

PHASES_LEGEND = (
    "Milliseconds of a decode step (prefill: of an answer), all questions. draft: asking the heads, feeding them, "
    "looking up; tree: growing it; verify: the target's forward; between: what is in no phase. around verify: draft, "
    f"tree, accept and commit together, wanted at most {OVERHEAD_GOAL:.0%} of a step. Stock methods are timed whole."
)
EFFICIENCY_LEGEND = (
    "possible = tau / ((T(n) + T_draft) / T(1)), with the costs measured before the run, each step by its own tree and "
    f"whether heads were asked. realised: decode speedup. Their ratio is wanted at least {GOAL}. The rest is in plain "
    "steps (a step of none): what a step should and did take, and where the difference is: drafting with growing the "
    "tree; verify, accept and commit; between the phases."
)
CURVE_LEGEND = (
    "Decode speedup of questions by their own tau: mean, and how many. No step is cheaper than a plain one, so speedup "
    "is at most tau."
)
STRETCH_LEGEND = (
    "Steps by the tokens of the answer that stood before them. looping: share of the tokens behind the place where an "
    "answer began to loop; loops are easily drafted. speedup: over none in the same stretch of the same answers."
)
DRAFTING_LEGEND = (
    "nodes: rows of a target forward, root included. plain steps: without any draft. heads asked: share of steps."
)


def speed_sections(summary: Summary) -> list[Section]:
    """Every table that has rows; summaries of older versions lack some."""
    everything = summary["measures"][ALL]
    found = [
        ("Time by phase", PHASES_LEGEND, *phase_rows(everything)),
        ("Realised and possible", EFFICIENCY_LEGEND, *efficiency_rows(summary.get("efficiency", {}))),
        ("Speedup over tau", CURVE_LEGEND, *curve_rows(summary.get("points", []))),
        ("As the answer grows", STRETCH_LEGEND, *stretch_rows(summary.get("stretches", []))),
        ("Drafting by task", DRAFTING_LEGEND, *drafting_rows(summary["measures"])),
    ]
    return [section for section in found if section[3]]


def phase_rows(measures: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Milliseconds by phase."""
    headers = ["method", "prefill", "step", *STEP_PHASES, "between", "around verify"]
    rows = []
    for name, m in measures.items():
        if not m["num_steps"] or m.get("ms_per_step") is None:
            continue
        phases = {phase: 1000 * seconds / m["num_steps"] for phase, seconds in m["phase_seconds"].items()}
        prefill = 1000 * m["phase_seconds"].get("prefill", 0.0) / m["num_answers"]
        cells = [name, f"{prefill:.1f}", f"{m['ms_per_step']:.2f}"]
        if "verify" not in phases:
            rows.append([*cells, *([DASH] * (len(headers) - len(cells)))])
            continue
        between = m["ms_per_step"] - sum(phases.get(phase, 0.0) for phase in STEP_PHASES)
        around = sum(phases.get(phase, 0.0) for phase in OVERHEAD) / m["ms_per_step"]
        cells += [number(phases.get(phase)) for phase in STEP_PHASES]
        rows.append([*cells, f"{between:.2f}", f"{around:.1%}"])
    return headers, rows


def efficiency_rows(found: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What was possible, what became of it, where the difference is."""
    headers = [
        "method",
        "possible",
        "realised",
        "realised / possible",
        "step should take",
        "step took",
        "lost in drafting",
        "in forwards",
        "between",
    ]
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


def curve_rows(points: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """One row a method, one column a range of tau."""
    ends = [f"to {end:g}" for end in BINS[1:]] + ["and more"]
    headers = ["method", *(f"tau {start:g} {end}" for start, end in zip(BINS, ends, strict=True))]
    rows = [
        [name, *(DASH if mean is None else f"{mean:.2f}x ({count})" for count, mean in cells)]
        for name, cells in by_tau(points).items()
    ]
    return headers, rows


def stretch_rows(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
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


def drafting_rows(measures: dict[str, dict[str, dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """One row a drafting method and task, all questions last; a single task is all questions."""
    headers = ["method", "task", "tau", "expected tau", "decode speedup", "nodes", "plain steps", "heads asked"]
    tasks = [task for task in measures if task != ALL]
    places = [*(tasks if len(tasks) > 1 else []), ALL]
    drafting = [name for name, m in measures[ALL].items() if m["plain_step_share"] not in (None, 1.0)]
    rows = []
    for name in drafting:
        for task in places:
            m = measures[task][name]
            rows.append(
                [
                    name,
                    task,
                    with_interval(m, "tau", unit=""),
                    number(m["expected_tau"]),
                    with_interval(m, "decode_speedup"),
                    with_interval(m, "mean_tree_nodes", ".1f", ""),
                    with_interval(m, "plain_step_share", ".0%", ""),
                    with_interval(m, "drafted_share", ".0%", "") if "drafted_share" in m else DASH,
                ]
            )
    return headers, rows
