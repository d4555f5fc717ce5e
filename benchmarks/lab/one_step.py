"""The picture of docs/how-a-token-flows.md: one step of a real answer, from the pending token to the next one.

python -m benchmarks.lab.one_step --record benchmarks/zen4-2-cores/one-step.json     decode, write the record
python -m benchmarks.lab.one_step --draw docs/one-step.svg                           draw from the record
"""

from __future__ import annotations

import argparse
import json
import math
from html import escape
from pathlib import Path
from typing import Any

from amphista import load, provenance
from amphista.tree.token_tree import TokenTree
from benchmarks.lab.same_answer import CHARACTER, MARGIN, MAX_NEW_TOKENS, PROMPT, WIDTH

RECORD = Path("benchmarks/zen4-2-cores/one-step.json")
TREE = 8
SHOWN = 8  # tokens before the pending one
COLUMN, ROW, BOX, CELL = 58, 30, 20, 24
STYLE = """<style>
text { fill: #1c2128 } .page { fill: #ffffff } .target { fill: #d9dde3 } .heads { fill: #9fd3b4 }
.lookup { fill: #f5cf87 } .both { fill: #b9cf9a } .unseen, .edge { fill: none; stroke: #b5bac2 }
.taken { fill: none; stroke: #1c2128; stroke-width: 2.5 } .left { opacity: 0.55 }
@media (prefers-color-scheme: dark) {
text { fill: #e6e9ee } .page { fill: #1d2127 } .target { fill: #4a525e } .heads { fill: #2c6e4b }
.lookup { fill: #80601b } .both { fill: #57702f } .unseen, .edge { stroke: #69707b } .taken { stroke: #e6e9ee } }
</style>
"""


def record() -> dict[str, Any]:
    """The first step that accepts three drafted tokens, of a tree that heads and lookup have made."""
    llm = load(tree=TREE)
    stream = llm.stream(PROMPT, max_new_tokens=MAX_NEW_TOKENS)
    text = llm.target.text
    assert text is not None
    known: list[int] = []
    stream.request.is_traced = True
    for step in stream.steps():
        trace = step.trace
        if trace is not None and len(known) > SHOWN and len(trace.path) > 3 and len(set(trace.sources)) > 2:
            tree = trace.tree
            return {
                "prompt": PROMPT,
                "target": llm.target.name,
                "drafter": llm.drafter.name,
                "dtype": llm.target.type_name,
                "tree": TREE,
                "before": [text.tokenizer.decode([token]) for token in known[:-1]],
                "pieces": [text.tokenizer.decode([token]) for token in tree.tokens],
                "parents": tree.parents,
                "probabilities": [round(math.exp(score), 3) for score in trace.scores],
                "sources": trace.sources,
                "path": trace.path,
                "next": text.tokenizer.decode([step.token_ids[-1]]),
                "provenance": provenance.record(),
            }
        known += step.token_ids
    raise SystemExit("no step of this answer is such a one: give another prompt")


def draw(found: dict[str, Any]) -> str:
    """Text and pending token; the tree beside who sees whom in the forward; the text after the step."""
    tree = TokenTree(list(range(len(found["parents"]))), found["parents"])  # of its shape: tokens are numbers here
    middle = 96
    under = middle + ROW * tree.num_nodes + 34
    after = [*zip(found["before"][-SHOWN:], ["target"] * SHOWN, strict=False)]
    pending = (found["pieces"][0], "target")
    gained = [(found["pieces"][node], found["sources"][node]) for node in found["path"][1:]]
    told = f"5, 6  Accepted: {len(gained)} drafted tokens, whose rows stay. The target's next choice is pending now."
    parts = [
        _label(MARGIN, 24, "1  Read: tokens whose rows are in the cache, and the pending one"),
        _line([*after, pending], 34),
        _label(MARGIN, middle - 10, "2, 3  Proposed and grown: probability of each path"),
        _tree(found, tree, middle),
        _label(WIDTH - MARGIN - CELL * (tree.num_nodes + 5), middle - 10, "4  Forward: who sees whom"),
        _mask(tree, middle),
        _label(MARGIN, under, told),
        _line([*after, pending, *gained, (found["next"], "target")], under + 10),
        _legend(under + 62),
    ]
    height = under + 92
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">\n{STYLE}'
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>\n{"".join(parts)}</svg>\n'
    )


def _tree(found: dict[str, Any], tree: TokenTree, top: int) -> str:
    """Nodes in the order they were added, one a line, indented by depth; the accepted path is outlined."""
    drawn = []
    for node, (piece, source) in enumerate(zip(found["pieces"], found["sources"], strict=True)):
        x, y = MARGIN + COLUMN * tree.depths[node], top + ROW * node
        taken = node in found["path"]
        if node:
            parent = tree.parents[node]
            left, middle = MARGIN + COLUMN * tree.depths[parent] + 10, y + BOX / 2
            kind = "taken" if taken else "edge"
            drawn.append(f'<path class="{kind}" d="M{left} {top + ROW * parent + BOX}V{middle}H{x}"/>')
        drawn.append(_token(x, y, piece, source, outlined=taken))
        likely = f"{100 * found['probabilities'][node]:.0f} %" if node else "pending"
        drawn.append(_label(x + _width(piece) + 6, y + 14, likely, "left"))
    return "".join(drawn)


def _mask(tree: TokenTree, top: int) -> str:
    """A line for each node: the committed rows, which all see, then the nodes; filled where it sees one."""
    left, drawn = WIDTH - MARGIN - CELL * (tree.num_nodes + 5), []
    for node, sees in enumerate(tree.ancestor_mask().tolist()):
        y = top + ROW * node
        drawn.append(f'<rect class="target" x="{left}" y="{y}" width="{CELL * 5 - 4}" height="{BOX}" rx="3"/>')
        drawn += [_label(left + 5, y + 14, "cached rows")]
        for other, seen in enumerate(sees):
            x = left + CELL * (5 + other)
            kind = "both" if seen else "unseen"
            drawn.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL - 4}" height="{BOX}" rx="3"/>')
    return "".join(drawn) + "\n"


def _line(tokens: list[tuple[str, str]], y: float) -> str:
    drawn, x = [], float(MARGIN)
    for n, (piece, source) in enumerate(tokens):
        drawn.append(_token(x, y, piece, source, outlined=n == len(tokens) - 1))
        x += _width(piece) + 4
    return "".join(drawn)


def _legend(y: float) -> str:
    says = {"heads": "the heads'", "lookup": "lookup's", "both": "both", "target": "the target's own"}
    drawn, x = [], float(MARGIN)
    for source, text in says.items():
        drawn.append(_token(x, y, "", source) + _label(x + 20, y + 14, text))
        x += 20 + CHARACTER * len(text) + 24
    return "".join(drawn)


def _width(piece: str) -> float:
    return CHARACTER * max(len(piece), 1) + 6


def _token(x: float, y: float, piece: str, source: str, *, outlined: bool = False) -> str:
    shape = f'x="{x:.1f}" y="{y}" width="{_width(piece):.1f}" height="{BOX}" rx="3"'
    outline = f'<rect class="taken" {shape}/>' if outlined else ""
    return f'<rect class="{source}" {shape}/>{outline}' + _label(x + 3, y + 14, piece.replace("\n", "\u21b5"))


def _label(x: float, y: float, text: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y}"{named} xml:space="preserve">{escape(text)}</text>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="decode until such a step, and write this record")
    parser.add_argument("--draw", type=Path, help=f"draw {RECORD} into this SVG file")
    arguments = parser.parse_args()
    if arguments.record:
        arguments.record.write_text(json.dumps(record(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.draw:
        arguments.draw.write_text(draw(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
