"""Drafter checkpoints: config.json + model.safetensors + README.md in a folder, a shipped name or a hub id.

Saving goes through a temporary folder and a rename; loading is strict. A checkpoint carries its target's fingerprint:
other dimensions or another vocabulary are refused always, other weights of the same shape (a fine-tune, another
quantisation) unless the caller allows it, because acceptance would silently collapse.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from amphista.config import as_dict, build
from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.drafter.base import Calibration, Drafter, DrafterConfig
from amphista.drafter.heads import ParallelHeads
from amphista.drafter.hub import HubAccess, fetch
from amphista.drafter.lookup import LOOKUP, WithLookup
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.drafter.none import NoDrafter
from amphista.errors import ConfigError, DrafterError
from amphista.target.spec import Fingerprint, SharedWeights, TargetSpec

FORMAT = 1
CHECKPOINT_FILES = ("config.json", "model.safetensors", "README.md")
DRAFTERS: dict[str, tuple[type[DrafterConfig], type[ParallelHeads]]] = {
    "amphista": (AmphistaConfig, Amphista),
    "medusa": (MedusaConfig, Medusa),
}
WEIGHTS_ONLY_DIFFER = {"lm_head_sha256"}


@dataclass(frozen=True)
class Checkpoint:
    """What config.json says, before any weight is read."""

    folder: Path
    kind: str
    config: DrafterConfig
    fingerprint: Fingerprint
    calibration: Calibration | None
    training: dict[str, Any]


def shipped_folder() -> Path:
    """Where the drafters that come with the package live."""
    return Path(str(resources.files("amphista"))) / "checkpoints"


def shipped_checkpoints() -> dict[str, list[Checkpoint]]:
    """Shipped checkpoints by kind ('amphista', 'medusa'); folders are named <target>-<kind>."""
    found: dict[str, list[Checkpoint]] = {}
    if shipped_folder().is_dir():
        for folder in sorted(shipped_folder().iterdir()):
            if (folder / "config.json").is_file():
                try:
                    checkpoint = read_checkpoint(folder)
                except DrafterError as error:  # one damaged drafter does not take the others away
                    warnings.warn(f"a shipped drafter is left out: {error}", stacklevel=2)
                    continue
                found.setdefault(checkpoint.kind, []).append(checkpoint)
    return found


def shipped_for(kind: str, fingerprint: Fingerprint) -> Checkpoint | None:
    """The shipped drafter of this kind for this target, else for other weights of its shape, if there is one."""
    found = [(set(c.fingerprint.differences(fingerprint)), c) for c in shipped_checkpoints().get(kind, [])]
    usable = [(len(different), c) for different, c in found if different <= WEIGHTS_ONLY_DIFFER]
    return min(usable, key=lambda pair: pair[0])[1] if usable else None


def locate_checkpoint(name: str, fingerprint: Fingerprint, hub: HubAccess | None = None) -> Checkpoint:
    """A shipped name for this target, a folder, or a hub id."""
    if name in DRAFTERS:
        shipped = shipped_for(name, fingerprint)
        if shipped is None:
            raise DrafterError(f"no {name} drafter is shipped for this target: give a folder or a hub id, or train one")
        return shipped
    path = Path(name).expanduser()
    if path.is_dir():
        return read_checkpoint(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        known = ", ".join(["none", LOOKUP, *DRAFTERS])
        raise DrafterError(
            f"unknown drafter {name!r}: expected {known}, a folder with config.json, or a hub id (owner/name)"
        )
    return read_checkpoint(fetch(name, CHECKPOINT_FILES, hub))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and check config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise DrafterError(f"{folder} holds no config.json: expected a drafter checkpoint")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise DrafterError(f"{path} has format {values.get('format')!r}; this version reads format {FORMAT}")
        kind = values["drafter"]
        if kind not in DRAFTERS:
            raise DrafterError(f"{path} names the drafter {kind!r}; this version knows {', '.join(DRAFTERS)}")
        calibration = values.get("calibration")
        return Checkpoint(
            folder=folder,
            kind=kind,
            config=build(DRAFTERS[kind][0], values["config"]),
            fingerprint=build(Fingerprint, values["target"]),
            calibration=None if calibration is None else build(Calibration, calibration),
            training=values.get("training", {}),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DrafterError(f"{path} is damaged or not ours: {error}") from error


def make_drafter(kind: str, config: DrafterConfig, spec: TargetSpec, shared: SharedWeights) -> ParallelHeads:
    """A fresh, untrained drafter."""
    if kind not in DRAFTERS:
        raise ConfigError(f"unknown drafter {kind!r}: expected one of {', '.join(DRAFTERS)}")
    return DRAFTERS[kind][1](config, spec, shared)


def save_drafter(
    drafter: ParallelHeads,
    folder: Path,
    fingerprint: Fingerprint,
    *,
    card: str,
    training: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint atomically; `dtype` rounds the weights (the tensors of the drafter stay as they are)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder.parent))
    try:
        tensors = {
            name: (tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor).contiguous().cpu()
            for name, tensor in drafter.state_dict().items()
        }
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        values = {
            "format": FORMAT,
            "drafter": drafter.name,
            "config": as_dict(drafter.config),
            "target": asdict(fingerprint),
            "calibration": None if drafter.calibration is None else asdict(drafter.calibration),
            "training": training,
        }
        (temporary / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(card, encoding="utf-8")
        temporary.chmod(0o755)
        (temporary / "model.safetensors").chmod(0o644)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(new: Path, folder: Path) -> None:
    """Put `new` where `folder` is; the old one is only removed once the new one stands."""
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def recover_drafter(folder: Path) -> None:
    """After a kill in the middle of `save_drafter`: put the old one back if it was between the two, sweep the rest."""
    old = folder.with_name(f".old-{folder.name}")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left_over in [old, *folder.parent.glob(".saving-*")]:
        shutil.rmtree(left_over, ignore_errors=True)


def load_drafter(
    name: str,
    spec: TargetSpec,
    shared: SharedWeights,
    fingerprint: Fingerprint,
    *,
    allow_other_target: bool = False,
    hub: HubAccess | None = None,
) -> Drafter:
    """Load a drafter for a target: 'none', a shipped name, a folder or a hub id; 'lookup', or any of them '+lookup'."""
    if name == "none":
        return NoDrafter()
    if name == LOOKUP:
        return WithLookup(NoDrafter())
    if name.endswith(f"+{LOOKUP}") and not Path(name).expanduser().exists():
        inner = name.removesuffix(f"+{LOOKUP}")
        return WithLookup(
            load_drafter(inner, spec, shared, fingerprint, allow_other_target=allow_other_target, hub=hub)
        )
    checkpoint = locate_checkpoint(name, fingerprint, hub)
    refuse_other_target(checkpoint, fingerprint, allow_other_target=allow_other_target)
    drafter = make_drafter(checkpoint.kind, checkpoint.config, spec, shared)
    path = checkpoint.folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DrafterError(f"{path} is missing or damaged ({error}): fetch or train the drafter again") from error
    try:
        drafter.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise DrafterError(f"{path} does not fit its config.json: {' '.join(str(error).split())}") from error
    _check_contents(drafter, checkpoint, path)
    drafter.calibration = checkpoint.calibration
    head = shared.head_weight
    return drafter.to(device=head.device, dtype=head.dtype).eval().requires_grad_(False)


def _check_contents(drafter: ParallelHeads, checkpoint: Checkpoint, path: Path) -> None:
    """What a strict load cannot see: token ids out of range, calibration for another number of heads."""
    ids, calibration = drafter.draft_ids, checkpoint.calibration
    if ids is not None and not bool(((ids >= 0) & (ids < drafter.spec.vocab_size)).all() & (ids.diff() > 0).all()):
        raise DrafterError(f"{path} holds a draft vocabulary that is not a sorted set of the target's token ids")
    if calibration is not None and {len(calibration.greedy), len(calibration.sampled)} != {drafter.num_heads}:
        raise DrafterError(f"{path.parent / 'config.json'} is calibrated for another number of heads than it has")


def refuse_other_target(checkpoint: Checkpoint, fingerprint: Fingerprint, *, allow_other_target: bool) -> None:
    """Raise DrafterError unless the drafter was trained for this target."""
    different = set(checkpoint.fingerprint.differences(fingerprint))
    if different - WEIGHTS_ONLY_DIFFER:
        raise DrafterError(
            f"the drafter in {checkpoint.folder.name} was trained for another target ({checkpoint.fingerprint.family}, "
            f"hidden size {checkpoint.fingerprint.hidden_size}, {checkpoint.fingerprint.vocab_size} tokens): "
            f"{', '.join(sorted(different - WEIGHTS_ONLY_DIFFER))} differ. Train one for this target"
        )
    if different and not allow_other_target:
        raise DrafterError(
            f"the drafter in {checkpoint.folder.name} was trained for other weights of the same shape (a fine-tune or "
            "another quantisation). Pass --allow-other-target to use it: output stays exact, it may accept less"
        )
