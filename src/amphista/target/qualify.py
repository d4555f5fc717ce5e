"""Which models take the fast forward (lean.py): only what it reproduces exactly, told apart by structure, not by name.

A model with anything unknown in it (an adapter, a quantised layer, a hook, a patched method, another rotary type) stays
on the stock path, and the reason is told.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from amphista.target.blocks import BlockedEmbedding, BlockedLinear
from amphista.target.spec import changes_with_length

CLASSES = {
    f"transformers.models.{family}.modeling_{family}.{name}ForCausalLM"
    for family, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}  # those whose rotation depends on a row's own position alone
DTYPES = {  # by device
    "cpu": {torch.float64, torch.float32, torch.bfloat16},
    "cuda": {torch.float64, torch.float32, torch.bfloat16, torch.float16},
}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
LINEAR, EMBEDDING = {nn.Linear, BlockedLinear}, {nn.Embedding, BlockedEmbedding}


def why_not_fast(model: Any) -> str | None:
    """The reason for which a stock model keeps its own forward, or None if the fast one may take its place.

    Ask before any hook of ours is on it.
    """
    return why_not_of_family(model) or _config_reason(model.config) or _tensor_reason(model) or _module_reason(model)


def why_not_of_family(model: Any) -> str | None:
    """The reason for which a model is of another family than the fast forward knows."""
    kind = type(model)
    if f"{kind.__module__}.{kind.__qualname__}" in CLASSES:
        return None
    return f"{kind.__name__} is not of the Llama family (Llama, Mistral, Qwen2, Qwen3)"


def _config_reason(config: Any) -> str | None:
    if getattr(config, "quantization_config", None) is not None:
        return "it is quantised"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if config._attn_implementation != "sdpa":
        return f"it was loaded with {config._attn_implementation} attention"
    rope = getattr(config, "rope_parameters", None) or {}
    found = rope.get("rope_type", "default")
    if found not in ROPE_TYPES and (found != "longrope" or changes_with_length(rope)):
        return f"its rotary positions are of type {found}"
    return None


def _tensor_reason(model: Any) -> str | None:
    weights = list(model.parameters())
    dtypes, devices = {w.dtype for w in weights}, {w.device for w in weights}
    if len(dtypes) > 1 or len(devices) > 1:
        return "its weights are of several types or on several devices"
    return _type_reason(dtypes.pop(), devices.pop().type)


def _type_reason(dtype: torch.dtype, device: str) -> str | None:
    if device not in DTYPES:
        return f"the fast path has not been tried on {device} devices"
    if dtype not in DTYPES[device]:
        return f"its weights are {str(dtype).removeprefix('torch.')}"
    return None


def _module_reason(model: Any) -> str | None:
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} carries a hook or a patched forward"
        if hasattr(module, "parametrizations"):
            return f"{name} is parametrised"
    for layer in decoder.layers:
        attention = _children(layer.self_attn) if hasattr(layer, "self_attn") else set()
        if _children(layer) != LAYER or attention - {"q_norm", "k_norm"} != ATTENTION or _children(layer.mlp) != MLP:
            return "a layer of it has parts that are not the family's"
        linear = [getattr(layer.self_attn, name) for name in ATTENTION]
        linear += [getattr(layer.mlp, name) for name in MLP - {"act_fn"}]
        if any(type(part) not in LINEAR for part in linear):
            return "a projection of it is not a plain linear layer"
    if type(model.get_output_embeddings()) not in LINEAR or type(decoder.embed_tokens) not in EMBEDDING:
        return "its embedding or LM head is not a plain one"
    if decoder.rotary_emb.inv_freq.shape[-1] * 2 != decoder.layers[0].self_attn.head_dim:
        return "it rotates a part of each head only"
    return None


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
