"""Drafter checkpoints: config.json + model.safetensors + README.md in a folder, a shipped name or a hub id.

A folder is somebody else's until the opposite is shown. Saving replaces these three files one by one and touches no
other. Loading allocates nothing by what config.json says: the drafter is built on `meta`, compared with the header of
the weights, and takes the tensors that are there.

A save is switched over by the one replacement of config.json, which names its weights by their digest: until then the
old pair loads, from then on the new one, whose weights may still lie under their staging name.

A checkpoint carries its target's fingerprint: other dimensions or another vocabulary are refused always, other weights
of the same shape (a fine-tune, another quantisation) unless the caller allows it: acceptance would silently collapse.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from amphista.config import build
from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.drafter.base import Calibration, DrafterConfig
from amphista.drafter.bita import Bita, BitaConfig
from amphista.drafter.eagle import Eagle, EagleConfig
from amphista.drafter.early_exit import EarlyExit, EarlyExitConfig
from amphista.drafter.falcon import Falcon, FalconConfig
from amphista.drafter.foreign import what_it_is
from amphista.drafter.hub import HubAccess, fetch
from amphista.drafter.hydra import Hydra, HydraConfig
from amphista.drafter.lookup import LOOKUP
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.drafter.proposer import NONE, Proposer, parts_of
from amphista.drafter.scoring import ScoringDrafter
from amphista.drafter.tandem import Tandem, TandemConfig
from amphista.drafter.weights import digest_in, digest_of, read_weights, write_weights
from amphista.errors import ConfigError, DrafterError
from amphista.target.spec import Fingerprint, SharedWeights, TargetSpec

FORMAT = 1
CONFIG, WEIGHTS, CARD = CHECKPOINT_FILES = ("config.json", "model.safetensors", "README.md")
STAGED_WEIGHTS = ".model.safetensors.new"
DRAFTERS: dict[str, tuple[type[DrafterConfig], type[ScoringDrafter]]] = {
    "amphista": (AmphistaConfig, Amphista),
    "medusa": (MedusaConfig, Medusa),
    "bita": (BitaConfig, Bita),
    "hydra": (HydraConfig, Hydra),
    "eagle": (EagleConfig, Eagle),
    "falcon": (FalconConfig, Falcon),
    "tandem": (TandemConfig, Tandem),
    "early-exit": (EarlyExitConfig, EarlyExit),
}
WEIGHTS_ONLY_DIFFER = {"lm_head_sha256"}
MAX_CONFIG_BYTES = 1 << 24
# What cards and records read of `training`, by section: everything else in there is only passed on.
TRAINING_NUMBERS = {
    "data": ("rows", "answer_tokens"),
    "progress": ("positions", "step", "seconds"),
    "before": ("positions", "step"),
}
TRAINING_SECTIONS = (*TRAINING_NUMBERS, "recipe", "converted", "validation", "calibration", "provenance")


@dataclass(frozen=True)
class Checkpoint:
    """What config.json says, before any weight is read. `weights_sha256`: of the weights it was written with."""

    folder: Path
    kind: str
    config: DrafterConfig
    fingerprint: Fingerprint
    calibration: Calibration | None
    training: dict[str, Any]
    weights_sha256: str | None = None


# -- finding ----------------------------------------------------------------------------------------------------------


def shipped_folder() -> Path:
    """Where the drafters that come with the package live."""
    return Path(str(resources.files("amphista"))) / "checkpoints"


def shipped_checkpoints() -> dict[str, list[Checkpoint]]:
    """Shipped checkpoints by kind ('amphista', 'medusa'); folders are named <target>-<kind>."""
    found: dict[str, list[Checkpoint]] = {}
    if shipped_folder().is_dir():
        for folder in sorted(shipped_folder().iterdir()):
            if (folder / CONFIG).is_file():
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


def locate_checkpoint(
    name: str | os.PathLike[str], fingerprint: Fingerprint, hub: HubAccess | None = None
) -> Checkpoint:
    """A shipped name for this target, a folder, or a hub id."""
    name = name_of(name)
    if name in DRAFTERS:
        shipped = shipped_for(name, fingerprint)
        if shipped is None:
            raise DrafterError(f"no {name} drafter is shipped for this target: give a folder or a hub id, or train one")
        return shipped
    if (local := local_checkpoint(name, fingerprint)) is not None:
        return local
    read_checkpoint(fetch(name, (CONFIG,), hub), name)  # what is no drafter of ours is not fetched any further
    return read_checkpoint(fetch(name, CHECKPOINT_FILES, hub), name)


def local_checkpoint(name: str, fingerprint: Fingerprint | None = None) -> Checkpoint | None:
    """The checkpoint in a folder, None for a hub id, which is not asked; raises DrafterError for what is neither.

    fingerprint: of the target whose shipped drafters the error offers, None: those of any.
    """
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return read_checkpoint(path)
        is_local = path.exists() or path.is_absolute()
    except (OSError, RuntimeError, ValueError):  # no such user, too long for a file name, a NUL in it
        is_local, path = True, Path(name)
    if is_local and os.path.isfile(path):
        raise DrafterError(what_it_is(path, {}, name))
    if is_local or name.startswith((".", "~")):
        raise DrafterError(f"there is no folder {name[:200]!r}: expected a drafter's, with {CONFIG} and {WEIGHTS}")
    if name.count("/") != 1:
        shipped = [kind for kind in shipped_checkpoints() if fingerprint is None or shipped_for(kind, fingerprint)]
        known = ", ".join([NONE, LOOKUP, *shipped])
        raise DrafterError(
            f"unknown drafter {name[:200]!r}: expected {known}, a folder with {CONFIG}, or a hub id (owner/name)"
        )
    return None


def name_of(drafter: str | os.PathLike[str]) -> str:
    """The name of a drafter as a string; raises DrafterError for what is neither a string nor a path."""
    name = os.fspath(drafter) if isinstance(drafter, str | os.PathLike) else None
    if not isinstance(name, str):
        raise DrafterError(f"a drafter is given by its name or folder, not as {type(drafter).__name__}")
    return name


# -- config.json ------------------------------------------------------------------------------------------------------


def read_checkpoint(folder: Path, source: str | None = None) -> Checkpoint:
    """Read and check config.json; source: what the user calls this folder."""
    path, values = folder / CONFIG, _read_json(folder / CONFIG)
    if not {"format", "drafter"} & set(values):
        raise DrafterError(what_it_is(folder, values, source or str(folder)))
    if values.get("format") != FORMAT:
        raise DrafterError(f"{path} has format {values.get('format')!r:.40}; this version reads format {FORMAT}")
    try:
        kind, calibration = values["drafter"], values.get("calibration")
        if kind not in DRAFTERS:
            raise DrafterError(f"{path} names the drafter {kind!r:.40}; this version knows {', '.join(DRAFTERS)}")
        return Checkpoint(
            folder=folder,
            kind=kind,
            config=build(DRAFTERS[kind][0], values["config"], "config"),
            fingerprint=build(Fingerprint, values["target"], "target"),
            calibration=None if calibration is None else build(Calibration, calibration, "calibration"),
            training=_checked_training(values.get("training", {})),
            weights_sha256=values.get("weights_sha256"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DrafterError(f"{path} is damaged or not ours: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} where there is none."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"larger than {MAX_CONFIG_BYTES >> 20} MB")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DrafterError(f"{path} is damaged or not ours: {error}") from error
    if not isinstance(values, dict):
        raise DrafterError(f"{path} is damaged or not ours: expected an object")
    return values


def _checked_training(training: dict[str, Any]) -> dict[str, Any]:
    """The record of the training, of which the parts that are read here have the form they need."""
    sections = {name: training.get(name) or {} for name in TRAINING_SECTIONS}
    if isinstance(sections["recipe"], dict):
        sections |= {f"recipe.{name}": sections["recipe"].get(name) or {} for name in ("data", "card")}
    wrong = [name for name, section in sections.items() if not isinstance(section, dict)]
    if not wrong:  # a converted drafter has data of its own, and no progress
        named = ["data", "progress"] * bool(sections["progress"]) + ["before"] * bool(sections["before"])
        numbers = [(name, key) for name in named for key in TRAINING_NUMBERS[name]]
        wrong = [f"{name}.{key}" for name, key in numbers if not isinstance(sections[name].get(key), int | float)]
    if wrong:
        raise ConfigError(f"training.{wrong[0]} has another form than training writes")
    return training


# -- saving -----------------------------------------------------------------------------------------------------------


def check_out(folder: Path) -> None:
    """Raise ConfigError unless a drafter may be saved here: a new folder, a drafter's, or one of hidden files."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is there already and is no folder: choose another --out")
    if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        try:
            read_checkpoint(folder)
        except DrafterError as error:
            raise ConfigError(f"{folder} is there already and is no drafter of ours: choose another --out") from error


def save_drafter(
    drafter: ScoringDrafter,
    folder: Path,
    fingerprint: Fingerprint,
    *,
    card: str,
    training: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint; at every moment the folder loads as the drafter before, or as this one.

    `dtype` rounds the weights (the tensors of the drafter stay as they are). Raises ConfigError where `check_out` does.
    """
    check_out(folder)
    tensors = {
        name: (tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in drafter.state_dict().items()
    }
    digest = digest_of(tensors)
    values = {
        "format": FORMAT,
        "drafter": drafter.name,
        "config": asdict(drafter.config),
        "target": asdict(fingerprint),
        "calibration": None if drafter.calibration is None else asdict(drafter.calibration),
        "training": training,
        "weights_sha256": digest,
    }
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recover_drafter(folder)
        staged = folder / STAGED_WEIGHTS
        write_weights(staged, tensors, digest)
        _sync(staged)
        _replace(folder / CONFIG, json.dumps(values, indent=1) + "\n")
        _replace(folder / CARD, card)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write the drafter to {folder}: {error}") from error
    finally:
        if folder.is_dir():
            recover_drafter(folder)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


def recover_drafter(folder: Path) -> None:
    """Finish a save that was broken off: weights that config.json names are put in their place, others removed."""
    if not folder.is_dir():
        return
    staged = folder / STAGED_WEIGHTS
    if staged.is_file():
        try:
            named = _read_json(folder / CONFIG).get("weights_sha256")
        except DrafterError:
            named = None
        if named is not None and digest_in(staged) == named:
            staged.replace(folder / WEIGHTS)
        else:
            staged.unlink()
    for name in (CONFIG, CARD):
        (folder / f".{name}.new").unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    _sync(fresh)
    fresh.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


# -- loading ----------------------------------------------------------------------------------------------------------


def make_drafter(kind: str, config: DrafterConfig, spec: TargetSpec, shared: SharedWeights) -> ScoringDrafter:
    """A fresh, untrained drafter."""
    if kind not in DRAFTERS:
        raise ConfigError(f"unknown drafter {kind!r}: expected one of {', '.join(DRAFTERS)}")
    return DRAFTERS[kind][1](config, spec, shared)


def load_proposer(
    name: str | os.PathLike[str],
    spec: TargetSpec,
    shared: SharedWeights,
    fingerprint: Fingerprint,
    *,
    allow_other_target: bool = False,
    hub: HubAccess | None = None,
) -> Proposer:
    """What proposes for a target: 'none', 'lookup', or what `load_drafter` takes, alone or with '+lookup'."""
    heads, use_lookup = parts_of(name_of(name))
    if heads == NONE:
        return Proposer(use_lookup=use_lookup)
    loaded = load_drafter(heads, spec, shared, fingerprint, allow_other_target=allow_other_target, hub=hub)
    return Proposer(loaded, use_lookup=use_lookup)


def load_drafter(
    name: str | os.PathLike[str],
    spec: TargetSpec,
    shared: SharedWeights,
    fingerprint: Fingerprint,
    *,
    allow_other_target: bool = False,
    hub: HubAccess | None = None,
) -> ScoringDrafter:
    """Load a drafter for a target: a shipped name, a folder or a hub id."""
    name = name_of(name)
    checkpoint = locate_checkpoint(name, fingerprint, hub)
    refuse_other_target(checkpoint, fingerprint, allow_other_target=allow_other_target)
    try:
        with torch.device("meta"):
            drafter = make_drafter(checkpoint.kind, checkpoint.config, spec, shared)
    except (ConfigError, RuntimeError, OverflowError, TypeError) as error:
        raise DrafterError(f"{checkpoint.folder / CONFIG} cannot be built: {' '.join(str(error).split())}") from error
    path = weights_file(checkpoint)
    drafter.load_state_dict(read_weights(path, drafter.state_dict(), shared.head_weight), strict=True, assign=True)
    _check_contents(drafter, checkpoint, path)
    drafter.calibration = checkpoint.calibration
    return drafter.eval().requires_grad_(False)


def weights_file(checkpoint: Checkpoint) -> Path:
    """The weights that belong to a config.json; raises DrafterError where it was written with others."""
    path, staged = checkpoint.folder / WEIGHTS, checkpoint.folder / STAGED_WEIGHTS
    wanted = checkpoint.weights_sha256
    if wanted is not None and digest_in(staged) == wanted:
        return staged
    if wanted is not None and digest_in(path) not in (None, wanted):  # None: written anew by somebody's own tool
        raise DrafterError(f"{path} holds other weights than its config.json was saved with: fetch or save both again")
    return path


def _check_contents(drafter: ScoringDrafter, checkpoint: Checkpoint, path: Path) -> None:
    """What a header does not show: token ids out of range, calibration for another number of heads."""
    ids, calibration = drafter.draft_ids, checkpoint.calibration
    if ids is not None and not bool(((ids >= 0) & (ids < drafter.spec.vocab_size)).all() & (ids.diff() > 0).all()):
        raise DrafterError(f"{path} holds a draft vocabulary that is not a sorted set of the target's token ids")
    if calibration is not None and calibration.num_heads != drafter.num_heads:
        raise DrafterError(f"{path.parent / CONFIG} is calibrated for another number of heads than it has")
    try:
        drafter.check_weights()
    except DrafterError as error:
        raise DrafterError(f"{path} cannot be used: {error}") from error


def refuse_other_target(checkpoint: Checkpoint, fingerprint: Fingerprint, *, allow_other_target: bool) -> None:
    """Raise DrafterError unless the drafter was trained for this target."""
    different = set(checkpoint.fingerprint.differences(fingerprint))
    if different - WEIGHTS_ONLY_DIFFER:
        raise DrafterError(
            f"the drafter in {checkpoint.folder.name} was trained for another target "
            f"({checkpoint.fingerprint.family:.40}, hidden size {checkpoint.fingerprint.hidden_size}, "
            f"{checkpoint.fingerprint.vocab_size} tokens): "
            f"{', '.join(sorted(different - WEIGHTS_ONLY_DIFFER))} differ. Train one for this target"
        )
    if different and not allow_other_target:
        raise DrafterError(
            f"the drafter in {checkpoint.folder.name} was trained for other weights of the same shape (a fine-tune or "
            "another quantisation). Pass --allow-other-target to use it: output stays exact, it may accept less"
        )
