"""Tiny random models of a given configuration's class: what a family does with windows, chunks and shared layers shows
on them in milliseconds, at contexts beyond every window.

Layers keep their pattern; everything that only costs time is made small. Where a class asks for more, because other
settings go with it (rotary factors with the size of heads), it gets that.
Weights are spread out, so that every token in a context counts.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from amphista.errors import TargetError, first_line
from amphista.target.families import auto_class

WINDOW = 7
HEAD_SIZE = 16
VOCAB = 256
MOST_LAYERS = 16
MOST_PARAMETERS = 60_000_000
SIZES = {  # by what a setting's name says, the first that fits; whole numbers only
    "intermediate_size": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "ffn_hidden_size": 64,
    "lora_rank": 32,
    "experts_per_tok": 2,
    "moe_topk": 1,
    "moe_top_k": 2,
    "moe_k": 2,
    "topk_group": 1,
    "n_group": 1,
    "shared_experts": 1,
    "experts": 4,
    "vocab_size": VOCAB,
    "sliding_window": WINDOW,
    "window_size": WINDOW,
    "attention_chunk_size": WINDOW,
}


def tiny_config(config: Any, num_heads: int = 2, head_size: int | None = HEAD_SIZE) -> Any:
    """A copy of a configuration for a model that is quickly built; raises whatever its class raises if it cannot be."""
    settings = config.to_dict()
    layers = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if isinstance(settings.get(layers), int):
        _keep_layers(settings, layers)
    for name, value in settings.items():
        settings[name] = _smaller(name, value)
    _smaller_heads(config, settings, num_heads, head_size)
    settings["tie_word_embeddings"] = False  # a tied head says the last token again
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            settings[name] = tiny_config(part, num_heads, head_size).to_dict()
    return type(config).from_dict(settings)


def tiny_model(config: Any) -> Any:
    """A random causal LM of such a copy, in float64 where its class can; raises TargetError where it cannot be built.

    Some classes ask for more heads than two, or for their own size, or have parts that are float32 whatever else is.
    """
    for head_size, num_heads, dtype in product((HEAD_SIZE, None), (2, 4), (torch.float64, torch.float32)):
        try:
            model = _built(
                tiny_config(config, num_heads, head_size), dtype, getattr(config, "_attn_implementation", None)
            )
            with torch.no_grad():
                model(input_ids=torch.arange(1, 4)[None], use_cache=False)
        except Exception as error:  # whatever a class raises that cannot be made small this way
            reason = f"{type(error).__name__}: {first_line(error)}"
        else:
            return model
    raise TargetError(f"no tiny model of this class can be built ({reason})")


def _built(config: Any, dtype: torch.dtype, attention: str | None) -> Any:
    auto = auto_class(config)
    config._experts_implementation = "eager"  # in any type
    with torch.device("meta"):
        model = auto.from_config(config, attn_implementation=attention)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters > MOST_PARAMETERS:
        raise ValueError(f"its smallest form still has {num_parameters / 1e6:.0f} M parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=dtype, attn_implementation=attention)
        _spread(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _spread(model: Any) -> None:
    """Small embeddings, so that what is read from the context outweighs them."""
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.1 if id(parameter) in embeddings else 1.5 * parameter.shape[-1] ** -0.5)


def _keep_layers(settings: dict[str, Any], layers: str) -> None:
    """Leave out layers, and their entries in lists with one for each: every kind is kept, and what shares with what."""
    total = settings[layers]
    kinds = settings.get("layer_types") or [0] * total
    shared = settings.get("num_kv_shared_layers") or 0
    own = total - shared
    first = next((n for n in range(min(4, own), own) if set(kinds[:n]) == set(kinds[:own])), own)
    kept = [*range(first), *range(total - min(shared, first), total)][:MOST_LAYERS]
    for name, value in settings.items():
        if isinstance(value, list) and len(value) == total:
            settings[name] = [value[index] for index in kept]
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):  # by layer
            by_layer = {int(key): entry for key, entry in value.items()}
            settings[name] = {new: by_layer[old] for new, old in enumerate(kept) if old in by_layer}
    settings[layers] = len(kept)
    if shared:
        settings["num_kv_shared_layers"] = min(shared, first)


def _smaller(name: str, value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(entry, int) for entry in value):
        return [_smaller(name, entry) for entry in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name.endswith(("token_id", "token_ids", "token_index")):
        return min(value, VOCAB - 1)
    size = next((size for part, size in SIZES.items() if part in name), value)
    return min(value, size)


def _smaller_heads(config: Any, settings: dict[str, Any], num_heads: int, head_size: int | None) -> None:
    """So many query heads, on half as many key-value heads where they were shared; head_size: None for the class's."""
    heads_name, hidden_name = (config.attribute_map.get(n, n) for n in ("num_attention_heads", "hidden_size"))
    heads, hidden = settings.get(heads_name), settings.get(hidden_name)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    key_heads = settings.get("num_key_value_heads") or heads
    before = settings.get("head_dim") or hidden // heads
    size, few = min(before, head_size or before), min(heads, num_heads)
    settings[heads_name], settings[hidden_name] = few, few * size
    if settings.get("head_dim"):
        settings["head_dim"] = size
    for layer in (settings.get("per_layer_config") or {}).values():  # layers whose heads are larger remain so
        if "head_dim" in layer:
            layer["head_dim"] = max(2, layer["head_dim"] * size // before)
    rope = settings.get("rope_parameters") or {}
    for name in rope.keys() & {"short_factor", "long_factor"}:  # a number for each frequency
        rope[name] = rope[name][: len(rope[name]) * size // before]
    if isinstance(settings.get("num_key_value_heads"), int):
        settings["num_key_value_heads"] = few if key_heads == heads else max(1, few // 2)
