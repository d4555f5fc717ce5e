"""amphista dev latency: how long a forward takes over tree size and context, and how long drafting takes.

amphista dev latency --out runs/latency
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from amphista.cli import options
from amphista.target import DEFAULT_TARGET


def latency(
    out: Annotated[Path, typer.Option(help="Folder for latency.json and latency.md.")],
    nodes: Annotated[str, typer.Option(help="Tree sizes, root included.")] = "1,2,4,8,16,32,64",
    contexts: Annotated[str, typer.Option(help="Rows in the cache before the forward.")] = "256",
    rounds: Annotated[int, typer.Option(help="Timed repetitions, after one that is not timed.")] = 7,
    drafters: Annotated[
        str, typer.Option(metavar="NAME[=DRAFTER],...", help="Drafters to time: shipped names, name=PATH, or none.")
    ] = "amphista,medusa",
    target: options.Target = DEFAULT_TARGET,
    allow_other_target: options.AllowOtherTarget = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    fast: options.Fast = True,
    json_lines: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object at the end.")] = False,
) -> None:
    """Measure what a forward and a draft cost here, and from which tau on drafting pays."""
    from amphista.cli.progress import StepProgress
    from amphista.evaluation.latency import JSON, LatencyConfig, latency_tables, measure_latency, write_latency
    from amphista.evaluation.methods import timed_drafters
    from amphista.target.loading import load_target

    config = LatencyConfig(nodes=_numbers("--nodes", nodes), contexts=_numbers("--contexts", contexts), rounds=rounds)
    loaded = load_target(target, device=device, dtype=dtype, fast=fast)
    timed = timed_drafters(drafters, loaded, allow_other_target=allow_other_target)
    with StepProgress() as progress:
        record = measure_latency(loaded, config, timed, progress.step)
    write_latency(out, record)
    print(latency_tables(record), file=sys.stderr if json_lines else sys.stdout)
    print(f"amphista: the record is {out / JSON}", file=sys.stderr)
    if json_lines:
        print(json.dumps(record))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from amphista.errors import ConfigError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}: expected whole numbers with commas between, as in 1,2,4") from error
