"""Going on from a trained drafter: its weights, settings and draft vocabulary; optimiser and schedule start anew.

A path correction may be put on a drafter that has none; it starts at nothing.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from amphista.config import build
from amphista.drafter.base import DrafterConfig
from amphista.drafter.checkpoint import DRAFTERS, load_drafter, locate_checkpoint, make_drafter
from amphista.drafter.scoring import ScoringDrafter
from amphista.errors import ConfigError
from amphista.target.target import Target
from amphista.train.config import TrainConfig

PATH_SETTINGS = ("path_rank", "path_shortlist")


def started_from(config: TrainConfig, target: Target) -> tuple[ScoringDrafter, dict[str, Any]]:
    """(the drafter named by `config.init`, ready to be trained in float32; what its training record says).

    raises ConfigError when it is of another kind than `config.drafter`, or `config.model` asks for settings other than
    its own and those of a path correction that it does not have.
    """
    assert config.init is not None
    checkpoint = locate_checkpoint(config.init, target.fingerprint)
    if checkpoint.kind != config.drafter:
        raise ConfigError(f"init {config.init!r} is a drafter of kind {checkpoint.kind}: expected {config.drafter}")
    has, asked = asdict(checkpoint.config), asdict(build(DRAFTERS[checkpoint.kind][0], config.model, "model"))
    new = {name: asked[name] for name in PATH_SETTINGS if name in config.model} if has.get("path_rank") is None else {}
    different = [name for name in config.model if has[name] != asked[name] and name not in new]
    other = [f"{name} is {has[name]}, not {asked[name]}" for name in different]
    if other:
        raise ConfigError(f"init {config.init!r} has other settings: {'; '.join(other)}. Leave [model] out")
    drafter = load_drafter(config.init, target.spec, target.shared, target.fingerprint)
    if new:
        drafter = _with_path(drafter, replace(checkpoint.config, **new), target)
    drafter.calibration = None
    before = {"init": checkpoint.folder.name, **_seen(checkpoint.training)}
    return drafter.float().requires_grad_(True).train(), before


def _with_path(drafter: ScoringDrafter, config: DrafterConfig, target: Target) -> ScoringDrafter:
    """The same drafter with an untrained path correction."""
    changed = make_drafter(drafter.name, config, target.spec, target.shared)
    weights = {name: tensor for name, tensor in changed.state_dict().items() if name.startswith("path.")}
    changed.load_state_dict({**weights, **drafter.state_dict()}, strict=True)
    return changed.to(drafter.device)


def _seen(training: dict[str, Any]) -> dict[str, Any]:
    """Positions and steps of all training before, and the data of the last."""
    progress, earlier = training.get("progress", {}), training.get("before", {})
    totals = {name: progress.get(name, 0) + earlier.get(name, 0) for name in ("positions", "step")}
    return {**totals, "data": training.get("data", {})}
