"""amphista train: a drafter for a frozen target, from its own answers.

amphista train --data answers.jsonl.gz --out runs/amphista
amphista train --recipe recipes/smollm2-135m-amphista.toml --data answers.jsonl.gz --out runs/amphista
amphista train --drafter medusa --set optimizer.epochs=3 --data answers.jsonl.gz --out runs/medusa
accelerate launch --num_processes 2 -m amphista train --data answers.jsonl.gz --out runs/amphista
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amphista.cli import options
from amphista.cli.launched import is_first, own_device
from amphista.target import DEFAULT_TARGET

if TYPE_CHECKING:
    from amphista.train.config import TrainConfig


def train(
    out: Annotated[Path, typer.Option(help="Folder for log, state and drafters; a killed run goes on from here.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder written by distill, or JSONL (.gz) with distilled rows (prompt_ids, answer_ids) or "
            "conversations (messages); repeatable."
        ),
    ] = None,
    target: options.Target = DEFAULT_TARGET,
    drafter: Annotated[
        str | None,
        typer.Option(
            help="amphista, medusa, hydra, eagle, falcon, tandem, early-exit, bita. Default: the recipe's, or amphista."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file with what differs from the defaults.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. optimizer.epochs=3; repeatable."),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Go on from this drafter: a shipped name, a folder or a hub id.")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object at the end.")] = False,
) -> None:
    """Train a drafter and calibrate it; OUT/best is ready for --drafter."""
    from amphista.config import apply_overrides, build, read_recipe
    from amphista.train.config import TrainConfig

    values = apply_overrides(read_recipe(recipe) if recipe else {}, settings or [])
    if drafter is not None:
        values["drafter"] = drafter
    if init is not None:
        values["init"] = init
    if data:
        values.setdefault("data", {})["files"] = [str(path) for path in data]
    config = _checked(build(TrainConfig, values))
    try:
        from amphista.train.trainer import Trainer
    except ImportError as error:
        from amphista.errors import ConfigError

        raise ConfigError(f"training needs the package {error.name}: pip install 'amphista[train]'") from error
    from amphista.cli.progress import StepProgress
    from amphista.cli.standard import resumable
    from amphista.target.loading import load_target

    with resumable(out), StepProgress(is_shown=is_first()) as progress:
        loaded = load_target(target, device=own_device(device), dtype=dtype)
        trainer = Trainer(loaded, config, out, progress.line, progress.step)
        folder = trainer.run()
    trainer.close()
    if not is_first():
        return
    print(f"amphista: the drafter is in {folder}; the best validated one in {out / 'best'}", file=sys.stderr)
    if json_lines:
        print(json.dumps({"out": str(folder), "best": str(out / "best"), "step": trainer.progress.step}))


def _checked(config: TrainConfig) -> TrainConfig:
    """The same; raises ConfigError for a drafter that cannot be made, or gone on from, before minutes of loading."""
    from amphista.config import build
    from amphista.drafter.checkpoint import DRAFTERS, local_checkpoint
    from amphista.errors import ConfigError

    if config.drafter not in DRAFTERS:
        raise ConfigError(f"unknown drafter {config.drafter!r}: expected one of {', '.join(DRAFTERS)}")
    build(DRAFTERS[config.drafter][0], config.model, "model")
    kind = config.init
    if kind is not None and kind not in DRAFTERS:
        checkpoint = local_checkpoint(kind)
        kind = None if checkpoint is None else checkpoint.kind
    if kind not in (None, config.drafter):
        raise ConfigError(f"--init {config.init} is a drafter of the kind {kind}: give --drafter {kind}, too")
    return config
