"""Find and load a target: a named default, a folder, a GGUF file, or a hub id."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from amphista.errors import TargetError
from amphista.kernels.int8 import can_quantise
from amphista.target import DEFAULT_TARGET
from amphista.target.attention import preferred_attention, refuse_unsupported
from amphista.target.gguf import (
    SMOLLM2_135M,
    PackagedTarget,
    Progress,
    gguf_target_folder,
    is_whole,
    packaged_folder,
    packaged_target_folder,
)
from amphista.target.pages import give_back
from amphista.target.probe import probe
from amphista.target.spec import TargetSpec
from amphista.target.target import Target
from amphista.target.text import Text

logger = logging.getLogger("amphista")

NAMED_TARGETS: dict[str, PackagedTarget] = {DEFAULT_TARGET: SMOLLM2_135M}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8 = "int8"


def load_target(
    name: str = DEFAULT_TARGET,
    *,
    device: str | None = None,
    dtype: str | None = None,
    fast: bool = True,
    progress: Progress = logger.info,
) -> Target:
    """Load a target and check that it verifies trees.

    name: a key of NAMED_TARGETS, a folder, a .gguf file or a hub id. device: 'cpu', 'cuda', ...; default CUDA where
    there is one. dtype: a key of DTYPES; default float32 on CPU, the model's own elsewhere; int8: weights of 8 bits on
    the fast path. fast: take the fast path where the model qualifies (`Target.path`, `Target.why_stock`).
    """
    place = device_of(device)
    int8 = dtype == INT8
    if int8:
        _refuse_int8(place, fast)
    folder = locate(name, progress)
    model = _load_model(name, folder, place, _dtype(dtype, place))  # first: it refuses families by name
    text = _load_text(name, folder)
    target = Target(model, text, name=name)
    if target.dtype is torch.float16 and _dtype_on_disk(folder) is not torch.float16:
        # Rounding through float16 changes the fingerprint's bf16 rows: take it from the weights as they are on disk.
        target.fingerprint = Target(_load_model(name, folder, torch.device("cpu"), "auto"), text).fingerprint
    quantisation = getattr(target.config, "quantization_config", None)
    if quantisation is not None:
        logger.warning(
            "the target is quantised. Kernels that scale activations over several rows at once would make its choices "
            "depend on the tree: check with --compare before trusting it"
        )
    probe(target)
    if fast and target.speed_up(release=True, int8=int8):
        stock_dtype = "float32" if int8 else dtype
        target.load_stock = lambda: load_target(name, device=device, dtype=stock_dtype, fast=False, progress=progress)
    elif int8:
        raise TargetError(f"{name} cannot be loaded in int8: {target.why_stock}")
    return target


def _refuse_int8(place: torch.device, fast: bool) -> None:
    """Raise TargetError where 8-bit weights cannot be used."""
    if not fast:
        raise TargetError("int8 weights need the fast path: leave out --no-fast (fast=False)")
    if not can_quantise(torch.empty(0, device=place)):
        raise TargetError("int8 weights need a CPU with 8-bit dot products (VNNI) and a torch built with oneDNN")


def locate(name: str, progress: Progress = logger.info) -> str:
    """Where `transformers` should load a target from: a folder, or the hub id itself."""
    if name in NAMED_TARGETS:
        return str(packaged_target_folder(NAMED_TARGETS[name], progress))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return str(gguf_target_folder(path, progress))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise TargetError(f"the folder {path} holds no config.json: expected a saved transformers model")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        known = ", ".join(NAMED_TARGETS)
        raise TargetError(f"unknown target {name!r}: expected {known}, a folder, a .gguf file or a hub id (owner/name)")
    return name


def hub_name(name: str) -> str:
    """The hub id of a target given by any of its names; for a folder or a file, its last part, which is none."""
    if name in NAMED_TARGETS:
        return NAMED_TARGETS[name].hub_id
    path = Path(name).expanduser()
    is_local = path.exists() or path.is_absolute() or name.startswith((".", "~"))
    return path.name if is_local else name


def device_of(device: str | None) -> torch.device:
    """The named device, or CUDA where there is one; raises TargetError where it is unknown or absent."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise TargetError(f"unknown device {device!r}: expected cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise TargetError(f"device {device!r} was asked for, but this torch sees no CUDA device: use --device cpu")
    return place


def _dtype(dtype: str | None, place: torch.device) -> Any:
    if dtype is None:
        return torch.float32 if place.type == "cpu" else "auto"
    if dtype == INT8:
        return torch.float32  # what is rounded, and what flows between the products
    if dtype not in DTYPES:
        raise TargetError(f"unknown dtype {dtype!r}: expected one of {', '.join([*DTYPES, INT8])}")
    return DTYPES[dtype]


def _load_model(name: str, folder: str, place: torch.device, dtype: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder)
        refuse_unsupported(config)
        attention = preferred_attention(config)
        if place.type == "cpu" and isinstance(dtype, torch.dtype):
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=copy.deepcopy(config), dtype="auto", attn_implementation=attention
            )
            if _is_only_weights(model):
                return _converted(model, dtype)
        return AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=attention
        ).to(place)
    except TargetError:
        raise
    except Exception as error:  # the loader raises a dozen kinds, from OSError to safetensors' own
        raise TargetError(f"cannot load target {name!r}: {_first_line(error)}") from error


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


def _dtype_on_disk(folder: str) -> torch.dtype | None:
    from transformers import AutoConfig

    dtype: torch.dtype | None = AutoConfig.from_pretrained(folder).dtype
    return dtype


def import_code(name: str) -> None:
    """Import what loading this target would import, so that its own memory can be told from that of code."""
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    MODEL_FOR_CAUSAL_LM_MAPPING.get(type(AutoConfig.from_pretrained(locate(name))), None)


def describe_target(name: str) -> dict[str, Any]:
    """What can be said of a target without loading its weights or fetching anything large.

    raises TargetError for a name that is no target, or one whose family is refused.
    """
    from transformers import AutoConfig

    if name in NAMED_TARGETS and not is_whole(packaged_folder(NAMED_TARGETS[name])):
        return {"name": name, "ready": False}
    folder = locate(name)
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise TargetError(f"cannot read the configuration of target {name!r}: {_first_line(error)}") from error
    refuse_unsupported(config)
    spec = TargetSpec.from_config(config, embedding_size=config.hidden_size, vocab_size=config.vocab_size)
    weights = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
    return {"name": name, "ready": True, "megabytes": round(sum(weights) / 1e6, 1), **dataclasses.asdict(spec)}


def _load_text(name: str, folder: str) -> Text:
    from transformers import AutoTokenizer

    try:
        return Text(AutoTokenizer.from_pretrained(folder))
    except Exception as error:
        raise TargetError(f"cannot load the tokenizer of target {name!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
