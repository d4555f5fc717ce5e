"""The weights file of a drafter: what its header says is compared before anything is read or allocated.

Files written here carry a digest of their tensors in the header, by which config.json names them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from amphista.errors import DrafterError

STORED_TYPES = {True: ("F64", "F32", "F16", "BF16"), False: ("I64",)}  # by whether the tensor is of floating point


def write_weights(path: Path, tensors: Mapping[str, Tensor], sha256: str) -> None:
    """Write tensors with their digest in the header, alone: of two entries the order would differ from file to file."""
    save_file(dict(tensors), path, metadata={"sha256": sha256})
    path.chmod(0o644)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_in(path: Path) -> str | None:
    """The digest that a weights file says it has, None where it says none or cannot be read."""
    try:
        with safe_open(path, framework="pt") as stored:
            return (stored.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None


def read_weights(path: Path, expected: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """The tensors of a file, once its header fits; weights in the type of `like`, everything on its device."""
    try:
        with safe_open(path, framework="pt") as stored:
            _check_header(stored, expected, path)
            tensors = {}
            for name, wanted in expected.items():
                dtype = like.dtype if wanted.is_floating_point() else wanted.dtype
                tensors[name] = stored.get_tensor(name).to(like.device, dtype, copy=True)
    except (OSError, SafetensorError) as error:
        raise DrafterError(f"{path} is missing or damaged ({error}): fetch or train the drafter again") from error
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise DrafterError(f"{path} holds numbers that are none in {like.dtype}: {broken[0]}")
    return tensors


def _check_header(stored: Any, expected: Mapping[str, Tensor], path: Path) -> None:
    """Names, shapes and types as the file's header has them; no tensor is read."""
    names = set(stored.keys())
    wrong = [f"{name} is missing" for name in expected if name not in names]
    wrong += [f"{name[:80]} is surplus" for name in sorted(names - set(expected))]
    for name in sorted(names & set(expected)):
        shape, dtype = stored.get_slice(name).get_shape(), stored.get_slice(name).get_dtype()
        types = STORED_TYPES[expected[name].is_floating_point()]
        if list(shape) != list(expected[name].shape) or dtype not in types:
            wrong.append(f"{name} is {dtype} {shape}, not {types[0]} {list(expected[name].shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DrafterError(f"{path} does not fit its config.json: {'; '.join(wrong[:3])}{more}")
