"""Files of drafters that other projects publish, read tensor by tensor; nothing in them is ever executed."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from amphista.drafter.card import read_front_matter
from amphista.drafter.hub import fetch
from amphista.drafter.scoring import ScoringDrafter
from amphista.errors import DrafterError
from amphista.target.spec import SharedWeights, TargetSpec

MAX_JSON_BYTES = 1 << 26
Reader = Callable[[], Tensor]


@dataclass(frozen=True)
class Published:
    """A converted drafter and where it came from. `dtype` is that of the published weights."""

    drafter: ScoringDrafter
    source: str
    file: str
    base_model: str | None
    license: str | None
    dtype: torch.dtype


def base_model_of(config: dict[str, Any]) -> str | None:
    """The target that its config.json names."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def name_of_source(source: str, folder: Path) -> str:
    """How its origin is told: a hub id, or a folder's own name."""
    return source if not Path(source).expanduser().is_dir() else folder.resolve().name


def refuse_transformed_logits(spec: TargetSpec, shared: SharedWeights) -> None:
    """Raise DrafterError for a target whose logits published LM heads would not reproduce."""
    if not shared.has_plain_logits:
        raise DrafterError(
            f"the target ({spec.family}) scales or caps its logits, which published heads know nothing of: "
            "train a drafter for it with `amphista train`"
        )


def locate(source: str, patterns: Sequence[str]) -> Path:
    """The folder of a published checkpoint, fetched where it is a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise DrafterError(f"there is no folder {source!r}: expected a published checkpoint's folder or hub id")
    return fetch(source, patterns)


def read_config(folder: Path) -> dict[str, Any]:
    """Its config.json, {} where there is none; raises DrafterError for one of ours."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = _read_json(path)
    except (ValueError, OSError, RecursionError) as error:
        raise DrafterError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise DrafterError(f"{path} is no JSON object: expected a published checkpoint's configuration")
    if "format" in config and "drafter" in config:
        raise DrafterError(f"{folder} is a drafter of this program already: use it with --drafter {folder}")
    return config


def license_of(folder: Path) -> str | None:
    """What its card says."""
    try:
        found = read_front_matter(folder / "README.md").get("license")
    except DrafterError:  # somebody else's card is no reason to refuse the weights
        return None
    return found if isinstance(found, str) else None


def readers(path: Path, prefix: re.Pattern[str]) -> dict[str, Reader]:
    """The tensors of a checkpoint file (or of the shards of an index) by name, each read only when called for."""
    found: dict[str, Reader] = {}
    for file in _shards(path, prefix) if path.suffix == ".json" else [path]:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
            found |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        else:
            found |= {name: partial(_identity, tensor) for name, tensor in _load_pickled(file).items()}
    return found


def _shards(path: Path, prefix: re.Pattern[str]) -> list[Path]:
    """The files of an index that hold heads; raises DrafterError for one outside the index's own folder."""
    try:
        index = _read_json(path)["weight_map"]
        names = sorted({index[name] for name in index if prefix.match(name)} or set(index.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"expected names of files beside it, found {', '.join(names)[:80] or 'none'}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DrafterError(f"{path} is no index of shards ({error}): fetch the checkpoint again") from error
    return [path.parent / name for name in names]


def _read_json(path: Path) -> Any:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MB")
    return json.loads(path.read_text(encoding="utf-8"))


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _load_pickled(path: Path) -> dict[str, Tensor]:
    """A .pt or .bin file of nothing but tensors; anything that would run code is refused by torch's own unpickler."""
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of before torch 1.6 cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise DrafterError(
            f"{path} is damaged, or holds more than tensors, which is never executed here: expected a state dictionary"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(n, str) and _is_plain(t) for n, t in loaded.items()):
        raise DrafterError(f"{path} is no dictionary of tensors: expected the state dictionary of a drafter")
    return loaded


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor has all its numbers in the file: none on `meta`, sparse, or repeated by strides."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
