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

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.drafter.published import (
    Published,
    Reader,
    base_model_of,
    license_of,
    locate,
    name_of_source,
    read_config,
    readers,
    refuse_transformed_logits,
)
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
HYDRA = "{} is a Hydra checkpoint, whose heads read the tokens drafted before them: `amphista convert hydra` reads it"


@dataclass
class _Heads:
    """Published tensors by position, as they are found."""

    weights: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    biases: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    lm_heads: dict[int, Tensor] = field(default_factory=dict)
    num_layers: int = 0
    token_map: Tensor | None = None


def read_medusa(source: str, spec: TargetSpec, shared: SharedWeights) -> Published:
    """Published heads as a Medusa drafter for a target of these sizes.

    source: a folder or a hub id. Raises DrafterError for what is no Medusa checkpoint, is incomplete, or was trained
    for a target of other sizes.
    """
    folder = locate(source, HUB_FILES)
    config = read_config(folder)
    path = next((folder / name for name in HEAD_FILES if (folder / name).is_file()), None)
    if any(name.startswith("hydra_") for name in [*config, *(file.name for file in folder.iterdir())]):
        raise DrafterError(HYDRA.format(folder))
    if path is None:
        raise DrafterError(f"{folder} holds no published Medusa heads: expected one of {', '.join(HEAD_FILES)}")
    refuse_transformed_logits(spec, shared)
    try:
        heads = _sort_tensors(readers(path, PREFIX), path, original_lm_head=bool(config.get("original_lm_head")))
    except (OSError, SafetensorError) as error:
        raise DrafterError(f"{path} is damaged or lacks a part ({error}): fetch the checkpoint again") from error
    _fill_repeated_blocks(heads, path)
    base_model = base_model_of(config)
    _check_sizes(heads, spec, path, base_model)
    _tell_differences(heads, config, spec, path)
    dtypes = {tensor.dtype for tensor in [*heads.weights.values(), *heads.lm_heads.values()]}
    return Published(
        drafter=_make_drafter(heads, spec, shared, path),
        source=name_of_source(source, folder),
        file=path.name,
        base_model=base_model,
        license=license_of(folder),
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
    )


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
