"""Read published Hydra and Hydra++ checkpoints (arXiv 2402.05109) into ours; nothing in them is ever executed.

    hydra_lm_head.pt, or .safetensors, of the Hydra repository, beside a config.json
        hydra_mlp.{k}.{l}.linear, .res_connection      blocks of head k, the first of which alone has a residual map
        hydra_lm_head.{k}[.1].weight, .bias            the heads' LM heads
        prefix_embeding_layer.layers.0.*, .norm        Hydra++ alone: a Llama layer over the target's states

Between blocks may stand others without weights, so l only gives the order. Head k reads E(x_{t+1}) .. E(x_{t+1+k}) and
predicts x_{t+2+k}, which is our head k + 1. Embeddings that a file repeats are the target's own and are not read.

Shapes: K heads, L blocks, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from amphista.drafter.hydra import Hydra, HydraConfig
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

FILES = ("hydra_lm_head.safetensors", "hydra_lm_head.pt")
HUB_FILES = ("config.json", "README.md", *FILES)
PREFIX = re.compile(r"hydra_|prefix_embeding_layer\.")
BLOCK = re.compile(r"hydra_mlp\.(\d{1,3})\.(\d{1,3})\.(linear|res_connection)\.(weight|bias)")
LM_HEAD = re.compile(r"hydra_lm_head\.(\d{1,3})(?:\.\d)?\.(weight|bias)")
REPEATED = re.compile(r"input_embed_fn\.weight|.*embed_tokens\.weight|.*rotary_emb\.inv_freq")
LAYER = "prefix_embeding_layer.layers.0."
PREFIX_NAMES = {
    "prefix_embeding_layer.norm.weight": "prefix.norm.weight",
    f"{LAYER}input_layernorm.weight": "prefix.layer.attention_norm.weight",
    f"{LAYER}post_attention_layernorm.weight": "prefix.layer.mlp_norm.weight",
    **{
        f"{LAYER}self_attn.{theirs}_proj.weight": f"prefix.layer.attention.{ours}.weight"
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))
    },
    **{f"{LAYER}mlp.{name}_proj.weight": f"prefix.layer.mlp.{name}.weight" for name in ("gate", "up", "down")},
}


def read_hydra(source: str, spec: TargetSpec, shared: SharedWeights) -> Published:
    """Published heads as a Hydra drafter for a target of these sizes.

    source: a folder or a hub id. Raises DrafterError for what is no such checkpoint, is incomplete, reads other states
    than the target's last, or was trained for a target of other sizes.
    """
    folder = locate(source, HUB_FILES)
    config = read_config(folder)
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise DrafterError(f"{folder} holds no published Hydra heads: expected one of {', '.join(FILES)}")
    if config.get("hidden_state_offset", 0) != 0:
        raise DrafterError(f"{folder} reads another layer's states than the last (hidden_state_offset): not supported")
    refuse_transformed_logits(spec, shared)
    base_model = base_model_of(config)
    try:
        named = _ours(readers(path, PREFIX), path)
        drafter = _drafter(named, spec, shared, path)
        dtype = _fill(drafter, named, f"{path}: {f'trained for {base_model}' if base_model else 'for another target?'}")
    except (OSError, SafetensorError) as error:
        raise DrafterError(f"{path} is damaged or lacks a part ({error}): fetch the checkpoint again") from error
    return Published(
        drafter=drafter,
        source=name_of_source(source, folder),
        file=path.name,
        base_model=base_model,
        license=license_of(folder),
        dtype=dtype,
    )


def _ours(tensors: Mapping[str, Reader], path: Path) -> dict[str, Reader]:
    """The tensors under our names; LM heads one by one, as own_head.{k}."""
    places = sorted({(int(block[1]), int(block[2])) for name in tensors if (block := BLOCK.fullmatch(name))})
    firsts = dict(reversed(places))
    order = {(head, place): sum(h == head and p < place for h, p in places) for head, place in places}
    found, unknown = dict[str, Reader](), list[str]()
    for name, read in tensors.items():
        if block := BLOCK.fullmatch(name):
            head, place = int(block[1]), int(block[2])
            if block[3] == "res_connection" and firsts[head] != place:
                unknown.append(name)
            part = {"linear": "linear", "res_connection": "residual"}[block[3]]
            found[f"heads.{head}.{order[head, place]}.{part}.{block[4]}"] = read
        elif lm_head := LM_HEAD.fullmatch(name):
            found[f"own_{'head' if lm_head[2] == 'weight' else 'bias'}.{int(lm_head[1])}"] = read
        elif name in PREFIX_NAMES:
            found[PREFIX_NAMES[name]] = read
        elif not REPEATED.fullmatch(name):
            unknown.append(name)
    if unknown or "heads.0.0.residual.weight" not in found:
        kind = ", ".join(unknown[:3]) or ("heads that read no tokens" if places else "nothing of the kind")
        raise DrafterError(
            f"{path} holds no Hydra heads that are known here: expected hydra_mlp.0.0.res_connection.weight and the "
            f"like, found {kind}"
        )
    return found


def _drafter(named: Mapping[str, Reader], spec: TargetSpec, shared: SharedWeights, path: Path) -> Hydra:
    """An untrained drafter of the sizes that the names tell."""
    blocks = [name.split(".") for name in named if name.startswith("heads.")]
    try:
        config = HydraConfig(
            num_heads=1 + max(int(block[1]) for block in blocks),
            num_layers=1 + max(int(block[2]) for block in blocks),
            base="prefix" if any(name.startswith("prefix.") for name in named) else "hidden",
            lm_head="own" if "own_head.0" in named else "shared",
            head_bias="own_bias.0" in named,
        )
    except ConfigError as error:
        raise DrafterError(f"{path} holds more than a Hydra drafter here may have: {error}") from error
    return Hydra(config, spec, shared).eval()


@torch.no_grad()
def _fill(drafter: Hydra, named: Mapping[str, Reader], what: str) -> torch.dtype:
    """Put the tensors in their places; returns their type. what: file and target, for errors."""
    places: dict[str, Tensor] = {}
    for name, parameter in drafter.named_parameters():
        is_own = name in ("own_head", "own_bias")
        places |= {f"{name}.{k}": row for k, row in enumerate(parameter)} if is_own else {name: parameter}
    config = drafter.config
    if config.lm_head == "own" and not config.head_bias and drafter.own_bias is not None:
        drafter.own_bias.zero_()  # a target's LM head with a bias; theirs have none
        places = {name: place for name, place in places.items() if not name.startswith("own_bias.")}
    wrong = [f"{name} is missing" for name in places if name not in named]
    wrong += [f"{name} is surplus" for name in named if name not in places]
    if wrong:
        raise DrafterError(f"{what}: it is incomplete, or of another form: {'; '.join(wrong[:3])}")
    dtypes = set()
    for name, place in places.items():
        tensor = named[name]()
        if tensor.shape != place.shape or not tensor.is_floating_point():
            raise DrafterError(f"{what}: {name} is {tensor.dtype} {list(tensor.shape)}, not {list(place.shape)}")
        place.copy_(tensor)
        dtypes.add(tensor.dtype)
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
