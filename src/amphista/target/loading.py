"""Find and load a target: a named default, a folder, a GGUF file, or a hub id."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from amphista.errors import NativeError, TargetError, first_line
from amphista.native.build import load
from amphista.target import DEFAULT_TARGET
from amphista.target.blocks import GGUF, check_coarse, give_blocks
from amphista.target.exactness import check_exactness
from amphista.target.families import auto_class, refuse_unsupported
from amphista.target.gguf import (
    SMOLLM2_135M,
    PackagedTarget,
    Progress,
    describe,
    gguf_target_folder,
    is_whole,
    packaged_file,
    packaged_folder,
    packaged_path,
    packaged_target_folder,
)
from amphista.target.pages import give_back
from amphista.target.qualify import why_not_of_family
from amphista.target.spec import TargetSpec
from amphista.target.target import Target
from amphista.target.text import Text

logger = logging.getLogger("amphista")

NAMED_TARGETS: dict[str, PackagedTarget] = {DEFAULT_TARGET: SMOLLM2_135M}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8 = "int8"


class Hub(TypedDict, total=False):
    """How a hub id is fetched, as `huggingface_hub` takes it: its revision, by which token, to where, or not at all."""

    revision: str
    token: str
    cache_dir: str
    local_files_only: bool


def load_target(
    name: str = DEFAULT_TARGET,
    *,
    device: str | None = None,
    dtype: str | None = None,
    fast: bool = True,
    native: bool = True,
    progress: Progress = logger.info,
    **hub: Unpack[Hub],
) -> Target:
    """Load a target and check that it verifies trees. Code that a repository brings along is never run.

    name: a key of NAMED_TARGETS, a folder, a .gguf file or a hub id. device: 'cpu', 'cuda', ...; default CUDA where
    there is one. dtype: a key of DTYPES; default float32 on CPU, the model's own elsewhere; int8: products of 8 bits on
    the fast path, of a GGUF file's own blocks where they can be had, else of weights rounded to 8 bits; gguf: such
    blocks: the float32 target in a quarter of the memory or less, and the default for such files on a CPU where the C
    step can be had. fast: take the fast path where the model qualifies (`Target.path`, `Target.why_stock`). native: let
    the C step take the place of its torch form where it can be built (`Target.why_not_native`). hub: for a hub id, the
    entries of `Hub`.
    """
    place = device_of(device)
    int8 = dtype == INT8
    if int8:
        _refuse_int8(place, fast=fast, native=native)
    if dtype in (None, GGUF, INT8):
        why_not = "it needs the C step, on a CPU" if place.type != "cpu" or not (fast and native) else None
        target = _in_blocks(name, progress, why_not, dtype)
        if target is not None:
            target.load_stock = lambda: load_target(name, device=device, dtype="float32", fast=False, progress=progress)
            return target
    kind = _dtype(dtype, place)  # before a file is converted
    folder = locate(name, progress)
    source = ModelSource(name, folder, hub)
    model = _load_model(source, place, kind)  # first: it refuses families by name
    text = load_text(source)
    target = Target(model, text, name=name)
    if target.dtype is torch.float16 and source.config().dtype is not torch.float16:
        # Rounding through float16 changes the fingerprint's bf16 rows: take it from the weights as they are on disk.
        target.fingerprint = Target(_load_model(source, torch.device("cpu"), "auto"), text).fingerprint
    quantisation = getattr(target.config, "quantization_config", None)
    if quantisation is not None:
        logger.warning(
            "the target is quantised. Kernels that scale activations over several rows at once would make its choices "
            "depend on the tree: check with --compare before trusting it"
        )
    check_exactness(target)
    if fast and target.speed_up(release=True, int8=int8, native=native):
        stock_dtype = "float32" if int8 else dtype
        target.load_stock = lambda: load_target(
            name, device=device, dtype=stock_dtype, fast=False, progress=progress, **hub
        )
    elif int8:
        raise TargetError(f"{name} cannot be loaded in int8: {target.why_stock}")
    return target


def _in_blocks(name: str, progress: Progress, why_not: str | None, dtype: str | None) -> Target | None:
    """A GGUF file's target on the file's own blocks; None where it has to be converted, which is told of float32.

    raises TargetError instead if it must be had so.
    """
    is_told = False
    try:
        if not _is_gguf(name):
            raise NativeError("it comes from no .gguf file")
        if why_not is not None:
            raise NativeError(why_not)
        load()
        is_told = True  # a C step that cannot be had is told by the float32 form
        return _load_blocks(name, progress, int8=dtype == INT8)
    except NativeError as error:
        if dtype == GGUF:
            raise TargetError(f"{name} cannot be loaded in its file's own blocks (gguf): {error}") from error
        if is_told and dtype is None:
            logger.warning("%s decodes in float32, slower and in four times the memory: %s", name, error)
        return None


def _load_blocks(name: str, progress: Progress, *, int8: bool) -> Target:
    """raises NativeError where the C step cannot take them."""
    from transformers import GenerationConfig

    gguf_file = _gguf_file(name, progress)
    folder = describe(gguf_file, progress, sha256=NAMED_TARGETS[name].sha256 if name in NAMED_TARGETS else None)
    source = ModelSource(name, str(folder), {})
    config = source.config()
    refuse_unsupported(config)
    keep_cap(config)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    why_not = why_not_of_family(model)
    if why_not is not None:
        raise NativeError(why_not)
    give_blocks(model, gguf_file, folder)
    if int8:
        check_coarse(model)
    model.generation_config = source.read(GenerationConfig)
    target = Target(model, load_text(source), name=name)
    # No check: the stock model, whose trees it would try, is left here, and the C step tries its own.
    if not target.speed_up(release=True, int8=int8, native=True) or target.why_not_native is not None:
        raise NativeError(target.why_stock or target.why_not_native)
    return target


def _is_gguf(name: str) -> bool:
    return name in NAMED_TARGETS or name.endswith(".gguf")


def _path(name: str) -> Path:
    """Where a GGUF target's file is or will be."""
    return packaged_path(NAMED_TARGETS[name]) if name in NAMED_TARGETS else Path(os.path.expanduser(name))


def _gguf_file(name: str, progress: Progress) -> Path:
    """The file that holds a target; raises NativeError where one is missed that was converted before."""
    if name not in NAMED_TARGETS:
        return _path(name)
    try:
        return packaged_file(NAMED_TARGETS[name], progress)
    except TargetError as error:
        if is_whole(packaged_folder(NAMED_TARGETS[name])):
            raise NativeError(str(error)) from error
        raise


def _refuse_int8(place: torch.device, *, fast: bool, native: bool) -> None:
    """Raise TargetError where 8-bit weights cannot be used."""
    if not (fast and native):
        raise TargetError("int8 weights need the C step: leave out --no-fast and --no-native (fast, native = False)")
    if place.type != "cpu":
        raise TargetError(f"int8 weights need the C step, which runs on a CPU, not on {place.type}")
    try:
        load()
    except NativeError as error:
        raise TargetError(f"int8 weights need the C step: {error}") from error


def locate(name: str, progress: Progress = logger.info) -> str:
    """Where `transformers` should load a target from: a folder, or the hub id itself."""
    if name in NAMED_TARGETS:
        return str(packaged_target_folder(NAMED_TARGETS[name], progress))
    path = Path(os.path.expanduser(name))
    if path.suffix == ".gguf":
        return str(gguf_target_folder(path, progress))
    if os.path.isdir(path):  # false for what can be no path, where pathlib raises
        if not (path / "config.json").is_file():
            raise TargetError(f"the folder {path} holds no config.json: expected a saved transformers model")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise TargetError(f"there is no folder {name!r}: expected a saved transformers model, or a .gguf file")
    if name.count("/") != 1:
        known = ", ".join(NAMED_TARGETS)
        raise TargetError(f"unknown target {name!r}: expected {known}, a folder, a .gguf file or a hub id (owner/name)")
    return name


def hub_name(name: str) -> str:
    """The hub id of a target given by any of its names; for a folder or a file, its last part, which is none."""
    if name in NAMED_TARGETS:
        return NAMED_TARGETS[name].hub_id
    path = Path(os.path.expanduser(name))
    is_local = os.path.exists(path) or path.is_absolute() or name.startswith((".", "~"))
    return path.name if is_local else name


def device_of(device: str | None) -> torch.device:
    """The named device, or CUDA where there is one; raises TargetError where it is unknown or absent."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise TargetError(f"unknown device {device!r}: expected cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise TargetError(f"device {device!r} was asked for, but this torch sees no CUDA device: use --device cpu")
    try:
        torch.empty(0, device=place)
    except Exception as error:  # every backend has its own
        raise TargetError(f"device {device!r} cannot be used here: {first_line(error)}. Use --device cpu") from error
    return place


def _dtype(dtype: str | None, place: torch.device) -> Any:
    if dtype is None:
        return torch.float32 if place.type == "cpu" else "auto"
    if dtype == INT8:
        return torch.float32  # what is rounded, and what flows between the products
    if dtype not in DTYPES:
        raise TargetError(f"unknown dtype {dtype!r}: expected one of {', '.join([*DTYPES, INT8, GGUF])}")
    return DTYPES[dtype]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A target's name, where `transformers` finds it, and how the hub is asked."""

    name: str
    folder: str
    hub: Hub

    def config(self) -> Any:
        """Its configuration."""
        from transformers import AutoConfig

        return self.read(AutoConfig)

    def model(self, kind: Any, **settings: Any) -> Any:
        """The model, whole; raises TargetError where its files lack tensors, which would be made of random numbers."""
        model, found = self.read(kind, output_loading_info=True, **settings)
        if missing := sorted(found["missing_keys"]):
            raise TargetError(
                f"the files of target {self.name!r} lack {len(missing)} tensors, {missing[0]} first: expected weights "
                "for every layer that its config.json names; fetch or save them anew"
            )
        return model

    def read(self, kind: Any, **settings: Any) -> Any:
        """What an auto class makes of it, running no code from there; raises TargetError, saying why."""
        try:
            return kind.from_pretrained(self.folder, trust_remote_code=False, **self.hub, **settings)
        except Exception as error:  # the loader raises a dozen kinds, from OSError to safetensors' own
            said = str(error)
            if "trust_remote_code" in said:
                raise TargetError(
                    f"target {self.name!r} needs code that its repository brings along, and amphista runs none: choose "
                    "a target of a family that the installed transformers has"
                ) from error
            what = kind.__name__.removeprefix("Auto").partition("For")[0].lower()
            raise TargetError(f"cannot load the {what} of target {self.name!r}: {first_line(error)}") from error


def _load_model(source: ModelSource, place: torch.device, dtype: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = source.config()
    refuse_unsupported(config)
    keep_cap(config)
    auto = auto_class(config)
    if place.type == "cpu" and isinstance(dtype, torch.dtype):
        model = source.model(auto, config=copy.deepcopy(config), dtype="auto")
        if _is_only_weights(model):
            return _converted(model, dtype)
    return source.model(auto, config=config, dtype=dtype).to(place)


def keep_cap(config: Any) -> None:
    """Let attention scores be capped where a model is built of this configuration: some sdpa leave it out silently."""
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        config._attn_implementation = "eager"


def _is_only_weights(model: Any) -> bool:
    """Whether converting the weights is all there is to another type: no part keeps its own, no buffer follows it."""
    keeps = model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict
    quantised = getattr(model.config, "quantization_config", None) is not None
    buffers = [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    return not keeps and not quantised and all(name.endswith("inv_freq") for name in buffers)


def _converted(model: Any, dtype: torch.dtype) -> Any:
    """The same model in another type, weight by weight: `transformers` would have all there in both for a while."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype is not dtype:
            before = parameter.data
            parameter.data = before.to(dtype)
            give_back(before)
    model.config.dtype = dtype
    return model


def import_code(name: str) -> None:
    """Import what loading this target would import, so that its own memory can be told from that of code."""
    from transformers import AutoTokenizer  # noqa: F401

    folder = _description(name) or describe(_gguf_file(name, logger.info), logger.info)
    refuse_unsupported(ModelSource(name, str(folder), {}).config())  # it looks at the class


def _description(name: str) -> str | None:
    """Where the configuration and all else beside the weights of a target are; None if its file has to be fetched."""
    if not _is_gguf(name):
        return locate(name)
    gguf_file = _path(name)
    if name in NAMED_TARGETS and not gguf_file.is_file():
        folder = packaged_folder(NAMED_TARGETS[name])
        return str(folder) if is_whole(folder) else None
    return str(describe(gguf_file, logger.info))


def describe_target(name: str, **hub: Unpack[Hub]) -> dict[str, Any]:
    """What can be said of a target without loading its weights or fetching anything large.

    raises TargetError for a name that is no target, or one whose family is refused.
    """
    folder = _description(name)
    if folder is None:
        return {"name": name, "ready": False}
    config = ModelSource(name, folder, hub).config()
    refuse_unsupported(config)
    text = config.get_text_config(decoder=True)
    spec = TargetSpec.from_config(config, embedding_size=text.hidden_size, vocab_size=text.vocab_size)
    is_file = _is_gguf(name) and _path(name).is_file()
    weights = [path.stat().st_size for path in ([_path(name)] if is_file else Path(folder).glob("*.safetensors"))]
    return {"name": name, "ready": True, "megabytes": round(sum(weights) / 1e6, 1), **dataclasses.asdict(spec)}


def load_text(source: ModelSource) -> Text:
    """Its tokenizer; raises TargetError."""
    from transformers import AutoTokenizer

    return Text(source.read(AutoTokenizer))
