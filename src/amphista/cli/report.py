"""amphista dev report: make the report of an evaluation anew from its records; no model is loaded.

amphista dev report runs/spec-bench
amphista dev report runs/bench-speed     # a folder of such folders and those of `amphista dev latency`: one page of all
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[
        Path, typer.Argument(help="The --out folder of a finished `amphista evaluate`, or a folder of several.")
    ],
) -> None:
    """Write DIR/summary.json, report.md and report.html from DIR's records; of several runs, one report.md of all."""
    from amphista.evaluation.gather import gather
    from amphista.evaluation.report import markdown_tables, write_report
    from amphista.evaluation.summary import RUN, rebuild_summary

    if not (folder / RUN).exists():
        print(gather(folder))
        print(f"amphista: the report is {folder / 'report.md'}", file=sys.stderr)
        return
    summary = rebuild_summary(folder)
    write_report(folder, summary)
    print(markdown_tables(summary))
    print(f"amphista: the report is {folder / 'report.html'}", file=sys.stderr)
