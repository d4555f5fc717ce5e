"""The report of a run: report.md, and report.html as one file that needs nothing else.

Both are made from the summary alone. Numbers come with 95 % intervals; what was resumed, failed or diverged is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment

from amphista.evaluation.cells import DASH, number, share, table, times, with_interval
from amphista.evaluation.metrics import ALL
from amphista.evaluation.summary import ACCEPTED
from amphista.files import write_file

Summary = dict[str, Any]
MAX_LISTED = 30
HEADERS = (
    "method",
    "tau",
    "tau loop-free",
    "tokens/s",
    "speedup",
    "decode speedup",
    "over hf",
    "same as none",
    "failed",
)
LEGEND = (
    "tau: tokens committed per target forward (loop-free: before an answer begins to loop). speedup: tokens per second "
    "over none (our engine without drafts), prefill included; decode speedup: without it. over hf: over stock "
    "generate, whose type stands under Methods. In parentheses: 95 % bootstrap intervals over questions. same as none: "
    "answers with identical tokens, of those that none gave (a method that failed on one does not have the same)."
)

EXPECTED = (
    "expected tau: by the drafter's own probabilities; as large as tau where they are calibrated. nodes: rows of a "
    "target forward, root included. loop-free speedup: of the tokens before an answer begins to loop; looping: how "
    "many answers do."
)


def write_report(folder: Path, summary: Summary) -> None:
    """Write report.md and report.html; without matplotlib the page has no figures and says so."""
    write_file(folder / "report.md", markdown(summary))
    write_file(folder / "report.html", html(summary))


# -- cells and tables, shared by both -----------------------------------------------------------------------------


def title(summary: Summary) -> str:
    """One line: target, questions, sampling."""
    settings = summary["run"]["settings"]
    params, asked = settings["params"], settings["questions"]
    count = f"{asked['count']} of {asked['full_size']}" if asked["count"] < asked["full_size"] else str(asked["count"])
    how = "greedy" if params["temperature"] == 0 else f"temperature {params['temperature']:g}"
    return f"{settings['target']} on {asked['name']}: {count} questions, {how}"


def setting_line(summary: Summary) -> str:
    """Limits, machine and versions."""
    run = summary["run"]
    settings, machine, versions = run["settings"], run["machine"], run["versions"]
    where = machine.get("accelerator") or f"{machine['processor']}, {machine['torch_threads']} threads"
    return (
        f"At most {settings['params']['max_new_tokens']} new tokens, {settings['repeats']} repeat(s), "
        f"{settings['dtype']}, {settings.get('path', 'stock')} forward, {where} ({machine['instruction_set']}), "
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"amphista {versions['amphista']}{f' at {git}' if (git := run['git']) else ''}, {run['date']}."
    )


def main_rows(measures: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The main table, one row per method."""
    return [
        [
            name,
            number(m["tau"]),
            number(m["tau_loop_free"]),
            number(m["tokens_per_second"], ".1f"),
            with_interval(m, "speedup"),
            with_interval(m, "decode_speedup"),
            with_interval(m, "speedup_hf"),
            "" if name == "none" else share(m["identical"], m["compared"]),
            f"{m['failed']} of {m['failed'] + m['num_answers']}",
        ]
        for name, m in measures.items()
    ]


def task_rows(summary: Summary, cell: Any) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table methods x tasks."""
    tasks = [task for task in summary["measures"] if task != ALL]
    methods = list(summary["measures"][ALL])
    rows = [[name, *(cell(summary["measures"][task][name]) for task in [*tasks, ALL])] for name in methods]
    return ["method", *tasks, ALL], rows


def detail_rows(measures: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What each method's forwards bring."""
    headers = ["method", "tau", "expected tau", "nodes", "accepted at depth 1, 2, ...", "loop-free speedup", "looping"]
    rows = [
        [
            name,
            number(m["tau"]),
            number(m["expected_tau"]),
            number(m["mean_tree_nodes"], ".1f"),
            " ".join(f"{value:.2f}" for value in m["acceptance_by_depth"]) or DASH,
            times(m["loop_free_speedup"]),
            f"{m['looping_answers']} of {m['num_answers']}",
        ]
        for name, m in measures.items()
    ]
    return headers, rows


def divergence_lines(summary: Summary) -> list[str]:
    """Every answer that is not `none`'s, with the position and the target's margin there."""
    lines = []
    for found in summary["divergences"][:MAX_LISTED]:
        where = f"{found['method']}, question {found['id']}, turn {found['turn'] + 1}"
        if found.get("earlier_turn"):
            lines.append(f"{where}: another prompt, because an earlier turn diverged")
        else:
            margin = "no second choice" if found["margin"] is None else f"margin {found['margin']:.2g}"
            lines.append(f"{where}: differs from token {found['position']} on, {margin}")
    more = len(summary["divergences"]) - MAX_LISTED
    return [*lines, f"and {more} more in summary.json"] if more > 0 else lines


def failure_lines(summary: Summary) -> list[str]:
    """Every failed record, up to a limit."""
    lines = [f"{f['method']}, question {f['id']}, turn {f['turn'] + 1}: {f['error']}" for f in summary["failures"]]
    more = len(lines) - MAX_LISTED
    return [*lines[:MAX_LISTED], f"and {more} more in summary.json"] if more > 0 else lines


def sections(summary: Summary) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """(heading, legend, headers, rows) of every table, in order."""
    everything = summary["measures"][ALL]
    found = [("All questions", LEGEND, list(HEADERS), main_rows(everything))]
    if len(summary["measures"]) > 2:
        found.append(("Speedup by task", "", *task_rows(summary, lambda m: with_interval(m, "speedup"))))
        found.append(("tau by task", "", *task_rows(summary, lambda m: with_interval(m, "tau", unit=""))))
    found.append(("What the forwards bring", EXPECTED, *detail_rows(everything)))
    return found


# -- Markdown -----------------------------------------------------------------------------------------------------


def markdown(summary: Summary) -> str:
    """The whole report as Markdown."""
    lines = [f"# {title(summary)}", "", setting_line(summary), ""]
    lines += [f"- {note}" for note in summary["notes"]] + [""]
    for heading, legend, headers, rows in sections(summary):
        lines += [f"## {heading}", "", *([legend, ""] if legend else []), table(headers, rows), ""]
    for heading, listed in (("Divergences", divergence_lines(summary)), ("Failures", failure_lines(summary))):
        lines += [f"## {heading}", "", *([f"- {line}" for line in listed] or ["None."]), ""]
    lines += ["## Methods", ""]
    lines += [f"- `{name}`: {described}" for name, described in method_lines(summary)]
    lines += ["", f"Command: `{summary['run']['command']}`", ""]
    return "\n".join(lines)


def markdown_tables(summary: Summary) -> str:
    """What a terminal gets: the title and the main table."""
    return f"{title(summary)}\n\n{table(list(HEADERS), main_rows(summary['measures'][ALL]))}\n"


def method_lines(summary: Summary) -> list[tuple[str, str]]:
    """Each method's name, and its settings with the folder or hub id that its drafter was given by."""
    given = summary["run"].get("drafters", {})
    return [
        (
            name,
            ", ".join(
                f"{k} {v}" for k, v in (m | {"from": given.get(name)}).items() if v is not None and "_sha256" not in k
            ),
        )
        for name, m in summary["run"]["settings"]["methods"].items()
    ]


# -- HTML ---------------------------------------------------------------------------------------------------------


def html(summary: Summary) -> str:
    """The whole report as one page; figures are inline SVG."""
    try:
        from amphista.evaluation.plots import figures
    except ImportError:
        drawn: list[tuple[str, str]] = []
    else:
        drawn = figures(summary)
    page = Environment(autoescape=True).from_string((Path(__file__).parent / "report.html.jinja").read_text("utf-8"))
    return page.render(
        title=title(summary),
        setting=setting_line(summary),
        notes=summary["notes"],
        sections=sections(summary),
        figures=drawn,
        samples=summary["samples"],
        accepted=ACCEPTED,
        lists=[("Divergences", divergence_lines(summary)), ("Failures", failure_lines(summary))],
        methods=method_lines(summary),
        command=summary["run"]["command"],
    )
