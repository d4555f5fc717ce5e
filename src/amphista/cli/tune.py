"""amphista dev tune: what steps cost here, and what trees follow from it; `--tree auto` decodes by these numbers.

amphista dev tune
amphista dev tune --refresh --drafter medusa --json
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from amphista.cli import options
from amphista.target import DEFAULT_TARGET


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
    """Show the measured costs of a step and the trees that pay; measure them where they are not known yet."""
    from amphista.engine import costs
    from amphista.evaluation.tune_report import tune_record, tune_text
    from amphista.llm import load

    llm = load(target, drafter, tree=1, device=device, dtype=dtype, fast=fast, allow_other_target=allow_other_target)
    record = tune_record(llm.target, llm.drafter, costs.tune(llm.target, llm.drafter, refresh=refresh))
    print(json.dumps(record) if json_lines else tune_text(record))
