"""The picture on top of the README: one answer decoded plainly and with drafts, coloured by who guessed its tokens.

python -m benchmarks.lab.same_answer --record benchmarks/zen4-2-cores/same-answer.json     decode, write the record
python -m benchmarks.lab.same_answer --draw docs/same-answer.svg                           draw from the record
"""

from __future__ import annotations

import argparse
import json
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from amphista import LLM, load, provenance
from amphista.drafter.lookup import Lookup
from amphista.drafter.proposer import Proposer
from amphista.tree.candidates import NgramDraft

RECORD = Path("benchmarks/zen4-2-cores/same-answer.json")
PROMPT = "Write a short poem about the sea, and then explain the poem line by line."
MAX_NEW_TOKENS = 72
TREE = 6
TARGET, HEADS, LOOKUP = "target", "heads", "lookup"
COLOURS = {TARGET: "#d9dde3", HEADS: "#9fd3b4", LOOKUP: "#f5cf87"}
WIDTH, LINE, CHARACTER, MARGIN = 860, 26, 7.2, 16


class NotingProposer(Proposer):
    """Keeps what lookup said before each step; for one sequence."""

    said: list[int] = []

    def ngrams(
        self, lookup: Lookup | None, token_ids: list[int], max_depth: int, *, seldom: bool = False
    ) -> NgramDraft | None:
        draft = super().ngrams(lookup, token_ids, max_depth, seldom=seldom)
        self.said = [] if draft is None else draft.tokens
        return draft


def record() -> dict[str, Any]:
    """The answer step by step. Of a token that both have drafted, lookup gets the name."""
    llm = load(tree=TREE)
    proposer = NotingProposer(llm.drafter.heads, use_lookup=True)
    noting = LLM(llm.target, proposer, tree=TREE)
    steps: list[dict[str, Any]] = []
    stream = noting.stream(PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    for step in stream.steps():
        drafted = step.token_ids[: step.num_accepted]
        agreed = next((n for n in count() if proposer.said[: n + 1] != drafted[: n + 1] or n == len(drafted)), 0)
        by = [LOOKUP if n < agreed else HEADS for n in range(len(drafted))]
        steps.append({"token_ids": step.token_ids, "by": [*by, *[TARGET] * (len(step.token_ids) - len(by))]})
        proposer.said = []
    plain = noting.baseline.generate(PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    text = llm.target.text
    assert text is not None
    for step_record in steps:
        step_record["pieces"] = [text.tokenizer.decode([token]) for token in step_record["token_ids"]]
    return {
        "prompt": PROMPT,
        "target": llm.target.name,
        "drafter": proposer.name,
        "dtype": llm.target.type_name,
        "tree": TREE,
        "identical": plain.token_ids == stream.answer.token_ids,
        "plain_forwards": plain.stats.num_steps + 1,  # the prompt's, which gives the first token
        "forwards": stream.stats.num_steps + 1,
        "steps": steps,
        "provenance": provenance.record(),
    }


def draw(found: dict[str, Any]) -> str:
    """Two blocks of the same text; a gap opens wherever another forward of the target begins."""
    one_each = [{"pieces": [piece], "by": [TARGET]} for step in found["steps"] for piece in step["pieces"]]
    title = f"plain decoding: {found['plain_forwards']} forwards of the target"
    plain, height = _block(one_each, title, MARGIN)
    title = f"{found['drafter']}: the same tokens in {found['forwards']} forwards"
    drafted, height = _block(found["steps"], title, height + LINE)
    legend, height = _legend(height + LINE)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>\n{plain}{drafted}{legend}</svg>\n'
    )


def _block(steps: list[dict[str, Any]], title: str, top: float) -> tuple[str, int]:
    """Tokens from left to right, line by line; returns the drawing and where it ends."""
    drawn, x, y = [_label(MARGIN, top + 14, title, bold=True)], float(MARGIN), top + LINE
    for step in steps:
        for piece, by in zip(step["pieces"], step["by"], strict=True):
            shown = piece.replace("\n", "\u21b5")
            width = CHARACTER * max(len(shown), 1) + 2
            if x + width > WIDTH - MARGIN:
                x, y = float(MARGIN), y + LINE
            drawn.append(_token(x, y, width, shown, by))
            x += width
        x += 4
    return "".join(drawn), int(y + LINE)


def _legend(top: float) -> tuple[str, int]:
    drawn, x = [], float(MARGIN)
    says = {HEADS: "guessed by the heads", LOOKUP: "guessed by lookup", TARGET: "chosen by the target, not guessed"}
    for by, text in says.items():
        drawn.append(_token(x, top, 14, "", by) + _label(x + 20, top + 14, text))
        x += 20 + CHARACTER * len(text) + 24
    return "".join(drawn), int(top + LINE + MARGIN / 2)


def _token(x: float, y: float, width: float, text: str, by: str) -> str:
    box = f'<rect x="{x:.1f}" y="{y:.0f}" width="{width - 1:.1f}" height="20" rx="3" fill="{COLOURS[by]}"/>'
    return box + _label(x + 1, y + 14, text) + "\n"


def _label(x: float, y: float, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    length = f' textLength="{CHARACTER * len(text):.1f}"' if text.strip() else ""
    return f'<text x="{x:.1f}" y="{y:.0f}" fill="#1c2128" xml:space="preserve"{length}{weight}>{escape(text)}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="decode the answer and write this record")
    parser.add_argument("--draw", type=Path, help=f"draw {RECORD} into this SVG file")
    arguments = parser.parse_args()
    if arguments.record:
        arguments.record.write_text(json.dumps(record(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.draw:
        arguments.draw.write_text(draw(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
