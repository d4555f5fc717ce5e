"""Which models take the fast forward (lean.py): only what it reproduces exactly, by class and by structure.

A model with anything unknown in it (an adapter, a quantised layer, a hook, a patched method, another rotary type) stays
on the stock path, and the reason is told.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from amphista.target.blocks import BlockedEmbedding, BlockedExperts, BlockedLinear
from amphista.target.experts import BLOCKS, chooses_within_groups, has_experts, router_of
from amphista.target.lean_layers import ACTIVATIONS, CLAMPED, NORMS, activation_of, mlp_of, score_cap
from amphista.target.spec import rotations

FAMILIES = {
    "cwm": "Cwm",
    "dots1": "Dots1",
    "ernie4_5": "Ernie4_5",
    "ernie4_5_moe": "Ernie4_5_Moe",
    "exaone4": "Exaone4",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "glm": "Glm",
    "glm4": "Glm4",
    "glm4_moe": "Glm4Moe",
    "gpt_oss": "GptOss",
    "granite": "Granite",
    "granitemoe": "GraniteMoe",
    "helium": "Helium",
    "llama": "Llama",
    "ministral": "Ministral",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "olmoe": "Olmoe",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "seed_oss": "SeedOss",
    "smollm3": "SmolLM3",
}
CLASSES = {f"transformers.models.{family}.modeling_{family}.{name}ForCausalLM" for family, name in FAMILIES.items()} | {
    "transformers.models.gemma3.modeling_gemma3.Gemma3ForConditionalGeneration"
}  # given text alone
# A row's rotation depends on its own position alone; of the last two, in the context that is read (`context_of`).
ROPE_TYPES = {"default", "linear", "llama3", "yarn", "longrope", "dynamic"}
DTYPES = {  # by device
    "cpu": {torch.float64, torch.float32, torch.bfloat16},
    "cuda": {torch.float64, torch.float32, torch.bfloat16, torch.float16},
}
ATTENTION = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"})
MLP = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
NO_WEIGHTS = {"act_fn", "activation_fn", "resid_attn_dropout", "resid_mlp_dropout"}
EXACT_NORM = "GptOssRMSNorm"  # float32 whatever the other weights are, as some routers
SHARED, SHARED_GATE = ("shared_expert", "shared_experts"), "shared_expert_gate"
LINEAR = {nn.Linear, BlockedLinear}
EMBEDDINGS = {f"{kind.__module__}.{kind.__qualname__}" for kind in (nn.Embedding, BlockedEmbedding)} | {
    f"transformers.models.{family}.modeling_{family}.{name}TextScaledWordEmbedding"
    for family, name in (("gemma", "Gemma"), ("gemma2", "Gemma2"), ("gemma3", "Gemma3"))
}


def why_not_fast(model: Any) -> str | None:
    """The reason for which a stock model keeps its own forward, or None if the fast one may take its place.

    Ask before any hook of ours is on it.
    """
    return (
        why_not_of_family(model)
        or _config_reason(model.config, model.config.get_text_config(decoder=True))
        or _attention_reason(model)
        or _tensor_reason(model)
        or _module_reason(model)
    )


def why_not_of_family(model: Any) -> str | None:
    """The reason for which a model is of another family than the fast forward knows."""
    if _full_name(model) in CLASSES:
        return None
    return f"{type(model).__name__} is not of the families that the fast forward knows"


def _full_name(thing: object) -> str:
    """Of its class: others, as in code that comes with a model, may be called the same in a module of their own."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _config_reason(whole: Any, config: Any) -> str | None:
    """config: of the text part."""
    if any(getattr(part, "quantization_config", None) is not None for part in (whole, config)):
        return "it is quantised"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention looks ahead"
    if config.model_type == "olmoe" and config.clip_qkv is not None:
        return "its queries, keys and values are clipped"
    unknown = {rope.get("rope_type", "default") for rope in rotations(config)} - ROPE_TYPES
    return f"its rotary positions are of type {min(unknown)}" if unknown else None


def _attention_reason(model: Any) -> str | None:
    found = model.config.get_text_config(decoder=True)._attn_implementation
    is_capped = score_cap(getattr(model.get_decoder().layers[0], "self_attn", None)) is not None
    if found == ("eager" if is_capped or not model._supports_sdpa else "sdpa"):  # which leaves a cap out
        return None
    return f"it was loaded with {found} attention"


def _tensor_reason(model: Any) -> str | None:
    blocks = [block for layer in model.get_decoder().layers if has_experts(block := _mlp_of(layer))]
    apart = [module for module in model.modules() if type(module).__name__ == EXACT_NORM]
    apart += [router_of(block) for block in blocks]
    exact = [part for module in apart for part in module.parameters() if part.dtype is torch.float32]
    left_out = {id(part) for part in exact}
    weights = list(model.parameters())
    dtypes, devices = {w.dtype for w in weights if id(w) not in left_out}, {w.device for w in weights}
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
        attention, block, linear = getattr(layer, "self_attn", nn.Identity()), _mlp_of(layer), []
        blocks = [(attention, ATTENTION), (block, MLP)]
        if has_experts(block):
            reason = _experts_reason(model, block)
            if reason is not None:
                return reason
            blocks[1:] = [(part, MLP) for name, part in block.named_children() if name in SHARED]
            linear += [part for name, part in block.named_children() if name == SHARED_GATE]
        for part, forms in blocks:
            names = _children(part) - {"q_norm", "k_norm"}
            if names not in forms:
                return "a layer of it has parts that are not the family's"
            linear += [getattr(part, name) for name in names]
        if frozenset(_children(layer) - {"self_attn", "mlp", "block_sparse_moe"}) not in NORMS:
            return "a layer of it has parts that are not the family's"
        if type(activation_of(layer)).__name__ not in {*ACTIVATIONS, CLAMPED}:
            return f"its activation is {type(activation_of(layer)).__name__}"
        if any(type(part) not in LINEAR for part in linear):
            return "a projection of it is not a plain linear layer"
    if type(model.get_output_embeddings()) not in LINEAR or _full_name(decoder.embed_tokens) not in EMBEDDINGS:
        return "its embedding or LM head is not a plain one"
    return None


def _mlp_of(layer: Any) -> Any:
    return mlp_of(layer) if hasattr(layer, "mlp") or hasattr(layer, "block_sparse_moe") else nn.Identity()


def _experts_reason(model: Any, block: Any) -> str | None:
    if next(block.parameters()).device.type != "cpu":
        return "its experts have a fast form on a CPU only"
    parts = {type(part) for part in (block, block.experts, router_of(block))} - {BlockedExperts}
    if _children(block) not in BLOCKS or any(part.__module__ != type(model).__module__ for part in parts):
        return "a layer of it has parts that are not the family's"
    if getattr(getattr(block, SHARED_GATE, None), "bias", None) is not None:
        return "the gate of its shared expert has a bias"
    return "its experts are chosen within groups" if chooses_within_groups(router_of(block)) else None


def _children(module: nn.Module) -> set[str]:
    """What of a module has weights of its own, by name."""
    return {name for name, _ in module.named_children()} - NO_WEIGHTS
