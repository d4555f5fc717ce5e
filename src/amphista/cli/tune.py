"""amphista dev tune: what steps cost here; `--tree auto` decodes by these numbers.

amphista dev tune
amphista dev tune --refresh --drafter medusa --json
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amphista.cli import options
from amphista.target import DEFAULT_TARGET

if TYPE_CHECKING:
    from amphista.engine.costs import Tuned
    from amphista.llm import LLM


def tune(
    target: options.Target = DEFAULT_TARGET,
    drafter: options.Drafter = None,
    allow_other_target: options.AllowOtherTarget = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    fast: options.Fast = True,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again, whatever is kept.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the measured costs of a step, and from which tau on trees pay; measure what is not known yet."""
    from amphista.engine import costs
    from amphista.llm import load

    llm = load(target, drafter, tree=1, device=device, dtype=dtype, fast=fast, allow_other_target=allow_other_target)
    record = _record(llm, costs.tune(llm.target, llm.drafter, refresh=refresh))
    print(json.dumps(record) if json_lines else _text(record))


def _record(llm: LLM, tuned: Tuned) -> dict[str, Any]:
    """Times in milliseconds; `forwards` in forwards of one row. pays_above_with_heads: the tau at which a tree of that
    many nodes, heads asked, is as fast as plain decoding."""
    from amphista import provenance

    costs = tuned.costs
    single = costs.verify[0]
    return {
        "target": llm.target.name,
        "drafter": llm.drafter.name,
        "dtype": llm.target.type_name,
        "path": llm.target.path,
        "device": str(llm.target.device),
        "spread": tuned.forward.spread,
        "verify": [
            {
                "nodes": size,
                "ms": 1000 * seconds,
                "forwards": costs.verify[size - 1] / single,
                "pays_above_with_heads": (costs.verify[size - 1] + costs.draft) / single,
            }
            for size, seconds in tuned.forward.by_rows.items()
        ],
        "draft_ms": 1000 * costs.draft,
        "draft_forwards": costs.draft / single,
        "further_round_ms": 1000 * costs.further_round,
        "sequence_ms": 1000 * costs.sequence,
        "thousand_cached_rows_ms": 1e6 * costs.cached_row,
        **provenance.record(),
    }


def _text(record: dict[str, Any]) -> str:
    from amphista.evaluation.cells import table

    machine = record["machine"]
    rows = [
        [str(row["nodes"]), f"{row['ms']:.1f}", f"{row['forwards']:.2f}", f"{row['pays_above_with_heads']:.2f}"]
        for row in record["verify"]
    ]
    return (
        f"{record['target']}, {record['dtype']}, {record['path']} path, {record['device']} "
        f"({machine.get('accelerator', machine['processor'])}, {machine['torch_threads']} threads)\n\n"
        f"{table(['nodes', 'ms', 'forwards of one', 'pays above a tau of'], rows)}\n\n"
        f"asking {record['drafter']}: {record['draft_ms']:.1f} ms, {record['draft_forwards']:.2f} forwards of one"
        + (f"; each further round: {record['further_round_ms']:.1f} ms\n" if record["further_round_ms"] else "\n")
        + f"each further sequence: {record['sequence_ms']:.2f} ms; 1,000 cached rows: "
        f"{record['thousand_cached_rows_ms']:.2f} ms\n"
        f"spread of the times (median over shortest, at worst): {record['spread']:.2f}"
    )
