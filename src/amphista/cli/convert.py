"""amphista convert: published drafters of other projects into ours; nothing in them is executed.

amphista convert medusa FasterDecoding/medusa-vicuna-7b-v1.3 --target lmsys/vicuna-7b-v1.3 --out drafters/vicuna-7b
amphista convert hydra ankner/hydra-vicuna-7b-v1.3 --target lmsys/vicuna-7b-v1.3 --out drafters/vicuna-7b-hydra
amphista convert medusa ./published --target ./vicuna-7b --data answers.jsonl.gz --out drafters/mine
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from amphista.cli import options

LAYOUTS = ("medusa", "hydra")


def convert(
    layout: Annotated[
        str, typer.Argument(metavar="LAYOUT", help="medusa: Medusa-1 heads, in any form; hydra: Hydra and Hydra++.")
    ],
    source: Annotated[str, typer.Argument(help="Folder or hub id of the published checkpoint.")],
    target: Annotated[str, typer.Option(help="The target it was trained for: as for generate.")],
    out: Annotated[Path, typer.Option(help="Folder for the converted drafter, ready for --drafter.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Answers (JSONL, .gz) to calibrate and measure it on, as for train; repeatable."),
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="For the card, e.g. apache-2.0. Default: the published one.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="For the card: the target's hub id, where --target is a folder.")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Convert a published drafter; with --data it is calibrated and measured, too."""
    from amphista.errors import ConfigError

    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}: expected {', '.join(LAYOUTS)}")
    from amphista.drafter.card import CardConfig
    from amphista.drafter.checkpoint import check_out
    from amphista.drafter.convert import read_medusa
    from amphista.drafter.convert_hydra import read_hydra
    from amphista.target.loading import load_target
    from amphista.train.recalibrate import save_converted

    check_out(out)
    loaded = load_target(target, device=device, dtype=dtype)
    read = {"medusa": read_medusa, "hydra": read_hydra}[layout]
    published = read(source, loaded.spec, loaded.shared)
    if published.base_model not in (None, target, base_model):
        print(f"amphista: note: {source} names {published.base_model} as its target", file=sys.stderr)
    card = CardConfig(license=license_id, base_model=base_model)
    training = save_converted(published, loaded, out, data or [], card)
    config = published.drafter.config
    own = "own LM heads" if config.lm_head == "own" else "the target's LM head"
    print(
        f"amphista: {config.num_heads} heads with {own} are in {out}"
        + ("" if data else "; not calibrated: give --data for that"),
        file=sys.stderr,
    )
    if json_lines:
        taus = {name: part["tau"] for name, part in training.get("validation", {}).items()}
        print(json.dumps({"out": str(out), "num_heads": config.num_heads, "lm_head": config.lm_head, "tau": taus}))
