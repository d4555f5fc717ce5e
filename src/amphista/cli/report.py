"""amphista dev report: make the report of an evaluation anew from its records; no model is loaded.

amphista dev report runs/spec-bench
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="The --out folder of a finished `amphista evaluate`.")],
) -> None:
    """Write DIR/summary.json, report.md and report.html from DIR's records."""
    from amphista.evaluation.report import markdown_tables, write_report
    from amphista.evaluation.summary import rebuild_summary

    summary = rebuild_summary(folder)
    write_report(folder, summary)
    print(markdown_tables(summary))
    print(f"amphista: the report is {folder / 'report.html'}", file=sys.stderr)
