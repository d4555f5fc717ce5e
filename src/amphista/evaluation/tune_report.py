"""What `--tree auto` knows of this machine, and what follows: the curve, the price of drafting, the trees that pay."""

from __future__ import annotations

import math
from typing import Any

from amphista import provenance
from amphista.drafter.base import Drafter
from amphista.drafter.lookup import DEEPEST, Lookup
from amphista.engine.costs import Tuned
from amphista.llm import calibrated_accuracy
from amphista.target.target import Target
from amphista.tree.budget import best_size
from amphista.tree.build import ranked
from amphista.tree.dynamic import best_first
from amphista.tree.tune import chain_scores

MATCHES = (1, 2, 4, 8, 16)


def tune_record(target: Target, drafter: Drafter, tuned: Tuned) -> dict[str, Any]:
    """One JSON-able record; times in milliseconds, `forwards` in forwards of one row.

    pays_above: tokens a step over that many nodes must commit to beat plain decoding, heads asked or not.
    """
    costs = tuned.costs
    single = costs.verify[0]
    return {
        "target": target.name,
        "drafter": drafter.name,
        "dtype": str(target.dtype).removeprefix("torch."),
        "path": target.path,
        "device": str(target.device),
        "spread": tuned.spread,
        "verify": [
            {
                "nodes": size,
                "ms": 1000 * seconds,
                "forwards": costs.verify[size - 1] / single,
                "pays_above_with_heads": (costs.verify[size - 1] + costs.draft) / single,
            }
            for size, seconds in tuned.verify.items()
        ],
        "draft_ms": 1000 * costs.draft,
        "draft_forwards": costs.draft / single,
        "heads": _heads(drafter, tuned),
        "lookup": [_lookup(match, tuned) for match in MATCHES],
        **provenance.record(),
    }


def _heads(drafter: Drafter, tuned: Tuned) -> dict[str, Any] | None:
    """The tree of a step on which the heads are as sure as they are on average."""
    accuracy, costs = calibrated_accuracy(drafter), tuned.costs
    if not accuracy:
        return None
    grown = best_first(-1, ranked(accuracy), costs.max_nodes, len(accuracy))
    size = best_size(grown.scores, costs, drafted=True)
    return _tree(size, 1 + grown.expected(size), costs.draft + costs.verify[size - 1], costs.verify[0])


def _lookup(match: int, tuned: Tuned) -> dict[str, Any]:
    """The chain behind a match of so many tokens, heads left alone."""
    costs, fresh = tuned.costs, Lookup()
    scores = chain_scores([math.log(fresh.likelihood(match + ahead)) for ahead in range(DEEPEST)])
    size = best_size(scores, costs, drafted=False)
    tau = sum(map(math.exp, scores[:size]))
    return {"match": match, **_tree(size, tau, costs.verify[size - 1], costs.verify[0])}


def _tree(size: int, tau: float, seconds: float, single: float) -> dict[str, Any]:
    return {"nodes": size, "expected_tau": tau, "expected_speedup": tau * single / seconds}


def tune_text(record: dict[str, Any]) -> str:
    """The same for people."""
    machine = record["machine"]
    where = machine.get("accelerator", machine["processor"])
    lines = [
        f"{record['target']}, {record['dtype']}, {record['path']} path, {record['device']} ({where}, "
        f"{machine['torch_threads']} threads)",
        "",
        " nodes       ms   forwards of one   pays above (tokens a step, heads asked)",
    ]
    lines += [
        f"{row['nodes']:6} {row['ms']:8.1f} {row['forwards']:17.2f} {row['pays_above_with_heads']:12.2f}"
        for row in record["verify"]
    ]
    lines.append("")
    if record["draft_ms"]:
        lines.append(
            f"asking {record['drafter']}: {record['draft_ms']:.1f} ms, {record['draft_forwards']:.2f} forwards"
        )
    if record["heads"] is not None:
        lines.append(f"heads as sure as on average: {_words(record['heads'])}")
    lines += [f"a match of {row['match']:2} tokens, lookup alone: {_words(row)}" for row in record["lookup"]]
    lines.append(f"spread of the times (median over shortest, at worst): {record['spread']:.2f}")
    return "\n".join(lines)


def _words(tree: dict[str, Any]) -> str:
    if tree["nodes"] == 1:
        return "plain decoding"
    return (
        f"{tree['nodes']} nodes, {tree['expected_tau']:.2f} tokens expected, "
        f"{tree['expected_speedup']:.2f}x plain decoding"
    )
