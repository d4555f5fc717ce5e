"""What a stock model's layers are to the fast forward (lean.py): their products, norms, and how positions turn them.

Families differ in where their norms stand, in what is fused, in which part of a head is rotated, by which angles, in
which layers. It is read off the modules, rotations off the configuration; qualify.py refuses what is not known here.

Shapes: H query heads, J key-value heads, E head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amphista.kernels.linear import Product
from amphista.kernels.parts import Gate, Norm, RotaryTable, paired
from amphista.target.experts import Experts, Mlp, has_experts, router_of
from amphista.target.spec import context_of

ACTIVATIONS = {"SiLU": False, "SiLUActivation": False, "GELUTanh": True, "PytorchGELUTanh": True}  # is it gelu
CLAMPED = "GptOssExperts"  # which gate by themselves
ALL_LAYERS, NO_TURN = "", None  # kinds of rotation: the only one a model has, and that of layers without positions

WITH_NEIGHBOURS = {"Ernie4_5Attention", "Ernie4_5_MoeAttention", "GlmAttention", "Glm4Attention", "HeliumAttention"}

# Norms before and behind attention, before and behind the MLP, by the names that a layer has.
PLACES: tuple[tuple[str | None, ...], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
)
NORMS = {frozenset(name for name in names if name is not None): names for names in PLACES}


@dataclass(frozen=True)
class LeanLayer:
    """One decoder layer's weights. `rule` and `turn` are the places of its attention's rule and of its rotation among
    the model's; `number`: from 1. Norms of queries and keys are over a head [E], or over all of them [H * E], [J * E].
    """

    attention_norm: Norm | None
    qkv: Product
    query_norm: Norm | None
    key_norm: Norm | None
    output: Product
    attention_out_norm: Norm | None
    mlp_norm: Norm | None
    mlp: Mlp | Experts
    sinks: Tensor | None
    mlp_out_norm: Norm | None
    rule: int
    turn: int
    number: int

    @classmethod
    def of(cls, layer: Any, number: int, rule: int, turn: int, num_to_pair: int, product: type[Product]) -> LeanLayer:
        """num_to_pair: how many numbers of a head are to be put into pairs."""
        attention, size = layer.self_attn, layer.self_attn.head_dim
        names = NORMS[frozenset(name for name, _ in layer.named_children() if name.endswith("layernorm"))]
        norms = [None if name is None else Norm.of(getattr(layer, name)) for name in names]
        before, behind, before_mlp, behind_mlp = norms
        of_heads = []
        for name in ("q_norm", "k_norm"):
            norm = Norm.of(getattr(attention, name)) if hasattr(attention, name) else None
            of_heads.append(norm and Norm(paired(norm.weight, size, num_to_pair), norm.eps))
        block = mlp_of(layer)
        return cls(
            attention_norm=before,
            qkv=_projections(attention, num_to_pair, product),
            query_norm=of_heads[0],
            key_norm=of_heads[1],
            output=product.of(attention.o_proj),
            attention_out_norm=behind,
            mlp_norm=before_mlp,
            mlp=Experts.of(block, product) if has_experts(block) else Mlp.of(block, product),
            mlp_out_norm=behind_mlp,
            sinks=getattr(attention, "sinks", None),
            rule=rule,
            turn=turn,
            number=number,
        )


def _projections(attention: Any, num_to_pair: int, product: type[Product]) -> Product:
    """Queries, keys and values of one layer as one product."""
    size = attention.head_dim
    if hasattr(attention, "qkv_proj"):
        layer, config = attention.qkv_proj, attention.config
        rows = [size * heads for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        weights = list(product.weight_of(layer).split(rows))
        biases = [None] * 3 if layer.bias is None else list(layer.bias.split(rows))
    else:
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights, biases = [product.weight_of(layer) for layer in layers], [layer.bias for layer in layers]
    weights[:2] = [paired(weight, size, num_to_pair) for weight in weights[:2]]
    biases[:2] = [None if bias is None else paired(bias, size, num_to_pair) for bias in biases[:2]]
    return product.side_by_side(weights, biases)


# -- positions ---------------------------------------------------------------------------------------------------------


def kind_of_turn(config: Any, layer: Any, index: int) -> str | None:
    """Which rotation a layer has: `ALL_LAYERS`, that of its kind of layer, or `NO_TURN`."""
    attention = layer.self_attn
    if not getattr(attention, "use_rope", True):
        return NO_TURN
    if (
        type(attention).__name__ == "Exaone4Attention"
        and attention.sliding_window is not None
        and not attention.is_sliding
    ):
        return NO_TURN
    kinds = getattr(config, "layer_types", None) or []
    by_kind = kinds and isinstance((config.rope_parameters or {}).get(kinds[index]), dict)
    return str(kinds[index]) if by_kind else ALL_LAYERS


def num_to_pair(attention: Any, rotary: Any, kinds: Sequence[str | None]) -> int:
    """How many numbers of a head a model rotates, each with one half of them away; 0 where it is its neighbour."""
    if type(attention).__name__ in WITH_NEIGHBOURS:
        return 0
    return max((2 * len(_frequencies(rotary, kind)) for kind in kinds if kind is not NO_TURN), default=0)


def _frequencies(rotary: Any, kind: str) -> Tensor:
    frequencies: Tensor = getattr(rotary, f"{kind}_inv_freq" if kind else "inv_freq")
    return frequencies


def rotary_table(rotary: Any, config: Any, kinds: Sequence[str | None], head_size: int, device: Any) -> RotaryTable:
    """The table of a model's own rotary embedding: complex [P, kinds, E / 2]; what is not rotated is multiplied by 1.

    Some rotations are others in a longer text than a target may read (`TargetSpec.max_positions`): none is asked for
    positions beyond."""
    context, limited_by = context_of(config)

    def make(num_positions: int) -> Tensor:
        rows = torch.empty(0, dtype=torch.float32, device=device)
        positions = torch.arange(num_positions, device=device)[None]
        if limited_by:
            positions.clamp_(max=context - 1)
        table = torch.ones(num_positions, len(kinds), head_size // 2, dtype=torch.complex64, device=device)
        for place, kind in enumerate(kinds):
            if kind is not NO_TURN:
                cosine, sine = rotary(rows, positions, *([kind] if kind else []))
                half = len(_frequencies(rotary, kind))  # behind them they are said again, or nothing is
                table[:, place, :half] = torch.complex(cosine[0, :, :half], sine[0, :, :half])
        return table

    return RotaryTable(make)


def score_cap(attention: Any) -> float | None:
    """What a layer's attention scores stay below in size, by a tanh (Gemma 2, arXiv 2408.00118); None: anything. Not
    what the configuration says, which families without it hold unread."""
    return getattr(attention, "attn_logit_softcapping", None) or None


def mlp_of(layer: Any) -> Any:
    """What follows a layer's attention: an MLP, or many of them."""
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def routers_of(decoder: Any) -> list[Any]:
    """What tells the experts of rows, of all layers of a stock model that have any."""
    return [router_of(block) for layer in decoder.layers if has_experts(block := mlp_of(layer))]


def activation_of(layer: Any) -> Any:
    """The function that gates a layer's inner states, or what has it within."""
    block = mlp_of(layer)
    part = block.experts if has_experts(block) else block
    return getattr(part, "act_fn", None) or getattr(part, "activation_fn", part)


def gate_of(layer: Any) -> Gate:
    """That of a known family."""
    found = activation_of(layer)
    if type(found).__name__ == CLAMPED:
        return Gate(slope=float(found.alpha), limit=float(found.limit))
    return Gate(by_gelu=ACTIVATIONS[type(found).__name__])
