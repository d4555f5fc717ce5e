"""Read published Medusa checkpoints (arXiv 2401.10774) into ours; nothing in them is ever executed.

Layouts, by their tensor names (head k, block l of L):
    medusa_lm_head.{safetensors,pt}   {k}.{l}.linear.{weight,bias}, {k}.{L}.weight       the Medusa repository's
    model*.safetensors, or .bin       medusa_head. + the same, beside the model's own    fine-tuned whole models (v1.0)
    model.safetensors                 blocks.{k}.layers.{l}.{weight,bias}, lm_heads.{k}.weight, token_map        vLLM's
Heads without an LM head of their own (the oldest form) read the target's: `lm_head="shared"`.

Head k of all of them predicts x_{t+2+k} from h_t, which is our head k + 1 (ALGORITHM section 1). The published class
repeats one block object L times, so a file may hold the first block alone; it is copied then. What config.json says of
sizes is often of another file: the tensors decide, and the log says so.

Shapes: K heads, L blocks, D hidden size, N tokens scored.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from amphista.drafter.card import read_front_matter
from amphista.drafter.hub import fetch
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.errors import ConfigError, DrafterError
from amphista.target.spec import SharedWeights, TargetSpec

log = logging.getLogger(__name__)

SHARDS = ".index.json"
HEAD_FILES = (
    *("medusa_lm_head.safetensors", "medusa_lm_head.pt", "medusa_lm_head.bin", f"medusa_lm_head.safetensors{SHARDS}"),
    *("model.safetensors", f"model.safetensors{SHARDS}", "pytorch_model.bin", f"pytorch_model.bin{SHARDS}"),
)
HUB_FILES = ("config.json", "README.md", "medusa_lm_head.*", "model*.safetensors", "model.safetensors.index.json")
PREFIX = re.compile(r"medusa_heads?\.")
NUMBER = r"(\d{1,3})"  # a name promises no more heads or blocks than this
BLOCK = re.compile(rf"{NUMBER}\.{NUMBER}\.linear\.(weight|bias)|blocks\.{NUMBER}\.layers\.{NUMBER}\.(weight|bias)")
LM_HEAD = re.compile(rf"{NUMBER}\.{NUMBER}\.weight|lm_heads\.{NUMBER}\.weight")
STATED = {"heads": ("medusa_num_heads", "num_heads"), "layers": ("medusa_num_layers",), "hidden size": ("hidden_size",)}
MAX_JSON_BYTES = 1 << 26
Reader = Callable[[], Tensor]
HYDRA = (
    "{} is a Hydra checkpoint: its heads read the tokens drafted before them, which no Medusa head does. There is no "
    "Hydra drafter here: train one for this target with `amphista train`"
)


@dataclass
class _Heads:
    """Published tensors by position, as they are found."""

    weights: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    biases: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    lm_heads: dict[int, Tensor] = field(default_factory=dict)
    num_layers: int = 0
    token_map: Tensor | None = None


@dataclass(frozen=True)
class Published:
    """A converted drafter and where it came from. `dtype` is that of the published weights."""

    drafter: Medusa
    source: str
    file: str
    base_model: str | None
    license: str | None
    dtype: torch.dtype


def read_medusa(source: str, spec: TargetSpec, shared: SharedWeights) -> Published:
    """Published heads as a Medusa drafter for a target of these sizes.

    source: a folder or a hub id. Raises DrafterError for what is no Medusa checkpoint, is incomplete, or was trained
    for a target of other sizes.
    """
    folder = _locate(source)
    config = _read_config(folder)
    path = next((folder / name for name in HEAD_FILES if (folder / name).is_file()), None)
    if any(name.startswith("hydra_") for name in [*config, *(file.name for file in folder.iterdir())]):
        raise DrafterError(HYDRA.format(folder))
    if path is None:
        raise DrafterError(f"{folder} holds no published Medusa heads: expected one of {', '.join(HEAD_FILES)}")
    probe = torch.linspace(-60.0, 60.0, 7)
    if not torch.equal(shared.transform(probe), probe):
        raise DrafterError(
            f"the target ({spec.family}) scales or caps its logits, which published Medusa heads know nothing of: "
            "train a drafter for it with `amphista train`"
        )
    try:
        heads = _sort_tensors(_readers(path), path, original_lm_head=bool(config.get("original_lm_head")))
    except (OSError, SafetensorError) as error:
        raise DrafterError(f"{path} is damaged or lacks a part ({error}): fetch the checkpoint again") from error
    _fill_repeated_blocks(heads, path)
    base_model = config.get("base_model_name_or_path")
    base_model = base_model if isinstance(base_model, str) and base_model else None
    _check_sizes(heads, spec, path, base_model)
    _tell_differences(heads, config, spec, path)
    dtypes = {tensor.dtype for tensor in [*heads.weights.values(), *heads.lm_heads.values()]}
    return Published(
        drafter=_make_drafter(heads, spec, shared, path),
        source=source if not Path(source).expanduser().is_dir() else folder.resolve().name,
        file=path.name,
        base_model=base_model,
        license=_license(folder),
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
    )


def _locate(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise DrafterError(f"there is no folder {source!r}: expected a published checkpoint's folder or hub id")
    return fetch(source, HUB_FILES)


def _read_config(folder: Path) -> dict[str, Any]:
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


def _license(folder: Path) -> str | None:
    try:
        found = read_front_matter(folder / "README.md").get("license")
    except DrafterError:  # somebody else's card is no reason to refuse the weights
        return None
    return found if isinstance(found, str) else None


# -- reading files ----------------------------------------------------------------------------------------------------


def _readers(path: Path) -> dict[str, Reader]:
    """The tensors of a checkpoint file (or of the shards of an index) by name, each read only when called for."""
    readers: dict[str, Reader] = {}
    for file in _shards(path) if path.suffix == ".json" else [path]:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
            readers |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        else:
            readers |= {name: partial(_identity, tensor) for name, tensor in _load_pickled(file).items()}
    return readers


def _shards(path: Path) -> list[Path]:
    """The files of an index that hold heads; raises DrafterError for one outside the index's own folder."""
    try:
        index = _read_json(path)["weight_map"]
        names = sorted({index[name] for name in index if PREFIX.match(name)} or set(index.values()))
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
        raise DrafterError(f"{path} is no dictionary of tensors: expected the state dictionary of Medusa heads")
    return loaded


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor has all its numbers in the file: none on `meta`, sparse, or repeated by strides."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


# -- sorting and checking tensors -------------------------------------------------------------------------------------


def _sort_tensors(tensors: dict[str, Reader], path: Path, *, original_lm_head: bool) -> _Heads:
    """Tensors by head and block; where there is a prefix, only what stands behind it."""
    if any(name.startswith("hydra_") for name in tensors):
        raise DrafterError(HYDRA.format(path))
    if any(PREFIX.match(name) for name in tensors):
        kept = {name: read for name, read in tensors.items() if PREFIX.match(name) or name == "token_map"}
        tensors = {PREFIX.sub("", name, count=1): read for name, read in kept.items()}
    heads, unknown = _Heads(), []
    for name, read in tensors.items():
        if block := BLOCK.fullmatch(name):
            head, layer, part = [group for group in block.groups() if group is not None]
            (heads.weights if part == "weight" else heads.biases)[int(head), int(layer)] = read()
            heads.num_layers = max(heads.num_layers, int(layer) + 1)
        elif lm_head := LM_HEAD.fullmatch(name):
            if not original_lm_head:  # vLLM's word for: all heads read the target's own
                heads.lm_heads[int(lm_head[1] or lm_head[3])] = read()
            if lm_head[2] is not None:
                heads.num_layers = max(heads.num_layers, int(lm_head[2]))
        elif name == "token_map":
            heads.token_map = read()
        elif not (name == "lm_head.weight" and original_lm_head):
            unknown.append(name)
    if unknown or not heads.weights:
        found = ", ".join(unknown[:3]) or "nothing of the kind"
        raise DrafterError(
            f"{path} holds no Medusa heads: expected tensors named like 0.0.linear.weight, found {found}"
        )
    return heads


def _fill_repeated_blocks(heads: _Heads, path: Path) -> None:
    """Where only block 0 of several is stored, it is the one object that the published class repeats."""
    num_heads = 1 + max(head for head, _ in heads.weights)
    wanted = [(head, layer) for head in range(num_heads) for layer in range(heads.num_layers)]
    if set(heads.weights) == {(head, 0) for head in range(num_heads)}:
        heads.weights = {(head, layer): heads.weights[head, 0] for head, layer in wanted}
        heads.biases = {(head, layer): heads.biases[head, 0] for head, layer in wanted if (head, 0) in heads.biases}
    missing = [f"block {layer} of head {head}" for head, layer in wanted if (head, layer) not in heads.weights]
    if heads.biases:
        missing += [f"the bias of block {at[1]} of head {at[0]}" for at in wanted if at not in heads.biases]
    if heads.lm_heads:
        missing += [f"the LM head of head {head}" for head in range(num_heads) if head not in heads.lm_heads]
    if missing or len(heads.lm_heads) > num_heads:
        what = ", ".join(missing[:3]) or "blocks for some of its LM heads"
        raise DrafterError(f"{path} is incomplete: it lacks {what}")


def _tell_differences(heads: _Heads, config: dict[str, Any], spec: TargetSpec, path: Path) -> None:
    found = {"heads": len(heads.weights) // heads.num_layers, "layers": heads.num_layers}
    found["hidden size"] = spec.hidden_size
    for what, names in STATED.items():
        said = next((config[name] for name in names if config.get(name) is not None), found[what])
        if said != found[what]:
            log.warning("%s holds %d %s, its config.json says %.40r: the file decides", path, found[what], what, said)


def _check_sizes(heads: _Heads, spec: TargetSpec, path: Path, base_model: str | None) -> None:
    hidden = spec.hidden_size
    trained_for = f"they were trained for {base_model}" if base_model else "give the target they were trained for"
    for (head, layer), weight in heads.weights.items():
        if weight.shape != (hidden, hidden) or not weight.is_floating_point():
            raise DrafterError(
                f"{path}: block {layer} of head {head} is {weight.dtype} of shape {list(weight.shape)}, but the "
                f"target's hidden size {hidden} needs floating-point [{hidden}, {hidden}]: {trained_for}"
            )
        bias = heads.biases.get((head, layer))
        if bias is not None and bias.shape != (hidden,):
            raise DrafterError(f"{path}: the bias of head {head} has shape {list(bias.shape)}: expected [{hidden}]")
    ids = heads.token_map
    if ids is not None and not _are_token_ids(ids, spec.vocab_size):
        raise DrafterError(f"{path}: token_map names tokens beyond the target's {spec.vocab_size}: {trained_for}")
    allowed = {spec.vocab_size} if ids is None else {spec.vocab_size, ids.numel()}
    for head, weight in heads.lm_heads.items():
        if weight.dim() != 2 or weight.shape[1] != hidden or weight.shape[0] not in allowed:
            raise DrafterError(
                f"{path}: the LM head of head {head} has shape {list(weight.shape)}, but the target has "
                f"{spec.vocab_size} tokens and hidden size {hidden}: {trained_for}"
            )


def _are_token_ids(ids: Tensor, vocab_size: int) -> bool:
    if ids.dim() != 1 or ids.is_floating_point() or not 1 <= ids.numel() <= vocab_size:
        return False
    return 0 <= int(ids.min()) <= int(ids.max()) < vocab_size


# -- the drafter ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _make_drafter(heads: _Heads, spec: TargetSpec, shared: SharedWeights, path: Path) -> Medusa:
    ids = heads.token_map
    try:
        config = MedusaConfig(
            num_heads=len(heads.weights) // heads.num_layers,
            num_layers=heads.num_layers,
            lm_head="own" if heads.lm_heads else "shared",
            draft_vocab=None if ids is None else ids.numel(),
        )
    except ConfigError as error:
        raise DrafterError(f"{path} holds more than a Medusa drafter here may have: {error}") from error
    drafter = Medusa(config, spec, shared)
    if ids is not None:
        drafter.set_draft_ids(ids.long())
    parameters = dict(drafter.named_parameters())
    for (head, layer), weight in heads.weights.items():
        parameters[f"heads.{head}.{layer}.linear.weight"].copy_(weight)
        if (head, layer) in heads.biases:  # else it stays at the 0 it starts from
            parameters[f"heads.{head}.{layer}.linear.bias"].copy_(heads.biases[head, layer])
    for head, weight in heads.lm_heads.items():
        drafter.own_head[head].copy_(weight if ids is None else _rows_of(weight, ids.long()))
    if heads.lm_heads and drafter.own_bias is not None:
        drafter.own_bias.zero_()  # published LM heads have none
    return drafter.eval()


def _rows_of(weight: Tensor, ids: Tensor) -> Tensor:
    """LM-head rows in the order of our draft vocabulary, which is sorted."""
    order = ids.argsort()
    return weight[ids[order]] if weight.shape[0] != ids.numel() else weight[order]
