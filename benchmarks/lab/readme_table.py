"""Write the README's table anew from a summary: python -m benchmarks.lab.readme_table [SUMMARY.json]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SUMMARY = Path("benchmarks/zen4-2-cores/spec-bench/summary.json")
ROWS = {
    "hf": "stock `generate` of transformers",
    "none": "amphista, plain decoding",
    "amphista": "Amphista heads",
    "lookup": "lookup in the text itself",
    "amphista+lookup": "**both, the default**",
}
BEGIN, END = "<!-- table: python -m benchmarks.lab.readme_table -->\n", "<!-- end of table -->"


def table(summary: dict[str, Any]) -> str:
    """Five rows of Markdown."""
    measures = summary["measures"]["all"]
    lines = ["| | tau | tokens/s | over plain (95 %) | same tokens |", "|---|---|---|---|---|"]
    for name, shown in ROWS.items():
        row = measures[name]
        low, high = row["speedup_interval"]
        over = "1.00x" if name == "none" else f"{row['speedup']:.2f}x ({low:.2f} to {high:.2f})"
        same = "" if name == "none" else f"{round(row['identical'] * row['compared'])} of {row['compared']}"
        lines.append(f"| {shown} | {row['tau']:.2f} | {row['tokens_per_second']:.1f} | {over} | {same} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, summary: dict[str, Any]) -> str:
    """The README with this table between its marks."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table(summary) + END + rest.split(END)[1]


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else SUMMARY
    readme = Path("README.md")
    changed = with_table(readme.read_text(encoding="utf-8"), json.loads(source.read_text(encoding="utf-8")))
    readme.write_text(changed, encoding="utf-8")
