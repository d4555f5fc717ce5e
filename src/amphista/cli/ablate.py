"""amphista dev ablate: all training runs of a plan, what is missing first run, then one table.

amphista dev ablate recipes/ablations.toml --data answers.jsonl.gz --out runs/ablations
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amphista.cli import options
from amphista.target import DEFAULT_TARGET

if TYPE_CHECKING:
    from amphista.target.target import Target


def ablate(
    plan: Annotated[Path, typer.Argument(help="TOML file with [base], [runs.NAME] and seeds.")],
    data: Annotated[list[Path], typer.Option(help="JSONL (.gz) as for `amphista train`; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for all runs; the same command again goes on from here.")],
    only: Annotated[str | None, typer.Option(metavar="RUN,...", help="Only these runs.")] = None,
    target: options.Target = DEFAULT_TARGET,
    device: options.Device = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print the table as one JSON object at the end.")] = False,
) -> None:
    """Train every variant of a plan on the same data and steps; print tau side by side."""
    from amphista.errors import ConfigError

    try:
        from amphista.train.ablations import Ablations, Plan, rows_of, table_lines
    except ImportError as error:
        raise ConfigError(f"training needs the package {error.name}: pip install 'amphista[train]'") from error
    from amphista.cli.progress import StepProgress
    from amphista.files import write_file
    from amphista.target.loading import load_target

    wanted = Plan.read(plan)
    with StepProgress() as progress:
        loaded = load_target(target, device=device)
        ablations = Ablations(loaded, wanted, data, out, progress.line, progress.step)
        results = ablations.run([] if only is None else only.split(","))
    rows = rows_of(results)
    _add_drafting(rows, ablations.drafters(), loaded)
    table = "\n".join(table_lines(rows)) + "\n"
    write_file(out / "table.md", table)
    print(table, file=sys.stderr if json_lines else sys.stdout)
    if json_lines:
        print(json.dumps({"runs": rows}))


def _add_drafting(rows: list[dict[str, Any]], folders: dict[str, Path], target: Target) -> None:
    """What a draft of each costs here, all timed in one run."""
    from amphista.evaluation.latency import LatencyConfig, measure_latency
    from amphista.evaluation.methods import timed_drafters

    drafters = timed_drafters(",".join(f"{name}={folder}" for name, folder in folders.items()), target)
    record = measure_latency(target, LatencyConfig(nodes=(1, 16), rounds=15), drafters)
    milliseconds = {row["drafter"]: row["ms"] for row in record["draft"] if row["what"] == "draft"}
    for row in rows:
        row["draft_ms"] = milliseconds[row["run"]]
