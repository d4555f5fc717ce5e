"""Write the README's table anew from a record beside llama.cpp: python -m benchmarks.lab.readme_table [RUN.json]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SUMMARY = Path("benchmarks/zen4-2-cores/llama-cpp/run.json")
BESIDE = "llama.cpp GGUF"
ROWS = {
    BESIDE: "llama.cpp, the same GGUF file (Q4_1)",
    "ours gguf/none": "amphista, plain, the same file",
    "ours gguf/amphista+lookup": "**amphista, drafted, the default**",
    "ours int8/none": "amphista, plain, its blocks times rows of 8 bits (`--dtype int8`, another target)",
    "ours int8/amphista+lookup": "amphista, drafted, `--dtype int8`",
}
BEGIN, END = "<!-- table: python -m benchmarks.lab.readme_table -->\n", "<!-- end of table -->"


def table(summary: dict[str, Any]) -> str:
    """A row of Markdown each; what drafts bring is told over plain decoding of the same type."""
    found = {row["method"]: row for row in summary["methods"]}
    beside = found[BESIDE]["decode_tokens_per_second"]
    lines = ["| | tokens/s | over llama.cpp | over its own plain | tokens of plain decoding |", "|---|---|---|---|---|"]
    for name, shown in ROWS.items():
        rate = found[name]["decode_tokens_per_second"]
        plain = found.get(f"{name.partition('/')[0]}/none")
        drafts = "" if plain is None else f"{rate / plain['decode_tokens_per_second']:.2f}x"
        lines.append(f"| {shown} | {rate:.1f} | {rate / beside:.2f}x | {drafts} | {found[name]['answers_as_plain']} |")
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
