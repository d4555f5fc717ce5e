"""amphista dev calibrate: measure a drafter on held-out answers and store what its trees need.

amphista dev calibrate runs/amphista/best --data answers.jsonl.gz --out drafters/amphista
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from amphista.cli import options
from amphista.target import DEFAULT_TARGET


def calibrate(
    drafter: Annotated[str, typer.Argument(help="A shipped name, a folder or a hub id.")],
    data: Annotated[list[Path], typer.Option(help="Answers (JSONL, .gz) as for train; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for the calibrated drafter.")],
    all_rows: Annotated[
        bool,
        typer.Option("--all-rows", help="Data the drafter was trained on: use all of it, not only what was held out."),
    ] = False,
    draft_vocab: Annotated[int | None, typer.Option(help="Score only that many of the data's tokens.")] = None,
    nodes: Annotated[int, typer.Option(help="Size of the static tree that is shown.")] = 16,
    target: options.Target = DEFAULT_TARGET,
    device: options.Device = None,
    dtype: options.Dtype = None,
    fast: options.Fast = True,
    json_lines: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object at the end.")] = False,
) -> None:
    """Temperatures per head, accuracy by depth and rank, coverage: measured and written into the checkpoint."""
    from amphista.drafter.checkpoint import check_out
    from amphista.target.loading import load_target
    from amphista.train.recalibrate import CalibrateConfig, recalibrate

    config = CalibrateConfig(all_rows=all_rows, draft_vocab=draft_vocab, nodes=nodes)
    check_out(out)
    record = recalibrate(load_target(target, device=device, dtype=dtype, fast=fast), drafter, data, out, config)
    print("\n".join(_lines(record)), file=sys.stderr if json_lines else sys.stdout)
    print(f"amphista: the calibrated drafter is in {out}", file=sys.stderr)
    if json_lines:
        print(json.dumps(record))


def _lines(record: dict[str, Any]) -> Iterator[str]:
    kind = "held-out" if record["held_out"] else "training"
    covered = f"{record['coverage']:.1%} of the text"
    yield f"{record['rows']} {kind} rows; a draft vocabulary of {record['draft_vocab']} tokens covers {covered}"
    for name, part in record["measured"].items():
        yield f"{name}: top-1 by head " + " ".join(f"{ranks[0]:.3f}" for ranks in part["top"])
        yield f"{name}: tau by nodes " + " ".join(f"{size}:{tau:.2f}" for size, tau in part["tau"].items())
    tree = record["static_tree"]
    yield f"--tree static:{tree['nodes']}: expected tau {tree['expected_tau']:.2f}"
