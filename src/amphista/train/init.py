"""Going on from a trained drafter: its weights, settings and draft vocabulary; optimiser and schedule start anew."""

from __future__ import annotations

from typing import Any

from amphista.config import as_dict, build
from amphista.drafter.base import ParallelHeads
from amphista.drafter.checkpoint import DRAFTERS, load_drafter, locate_checkpoint
from amphista.errors import ConfigError
from amphista.target.target import Target
from amphista.train.config import TrainConfig


def started_from(config: TrainConfig, target: Target) -> tuple[ParallelHeads, dict[str, Any]]:
    """(the drafter named by `config.init`, ready to be trained in float32; what its training record says).

    raises ConfigError when it is of another kind than `config.drafter`, or `config.model` asks for other settings.
    """
    assert config.init is not None
    checkpoint = locate_checkpoint(config.init, target.fingerprint)
    if checkpoint.kind != config.drafter:
        raise ConfigError(f"init {config.init!r} is a drafter of kind {checkpoint.kind}: expected {config.drafter}")
    has, asked = as_dict(checkpoint.config), as_dict(build(DRAFTERS[checkpoint.kind][0], config.model, "model"))
    other = [f"{name} is {has[name]}, not {asked[name]}" for name in config.model if has[name] != asked[name]]
    if other:
        raise ConfigError(f"init {config.init!r} has other settings: {'; '.join(other)}. Leave [model] out")
    drafter = load_drafter(config.init, target.spec, target.shared, target.fingerprint)
    assert isinstance(drafter, ParallelHeads)
    drafter.calibration = None
    before = {"init": checkpoint.folder.name, **_seen(checkpoint.training)}
    return drafter.float().requires_grad_(True).train(), before


def _seen(training: dict[str, Any]) -> dict[str, Any]:
    """Positions and steps of all training before, and the data of the last."""
    progress, earlier = training.get("progress", {}), training.get("before", {})
    totals = {name: progress.get(name, 0) + earlier.get(name, 0) for name in ("positions", "step")}
    return {**totals, "data": training.get("data", {})}
