"""The fast forward of the Llama family and its kin: the stock model's weights and arithmetic, without its overhead.

For what qualify.py admits, read by lean_layers.py: projections of one input fused into one product, grouped-query
attention without repeating keys and values, one mask for each kind of layer, rows of the cache written in place. The
two numbers of a head that are rotated together are stored side by side, so that rotating is one product of complex
numbers, which also scales the queries. Everything else runs on the stock model; both are tested equal.

Shapes: B sequences, N new rows each, S cached rows with them, H query heads, J key-value heads, G = H / J, E head size,
D hidden size, W = (1 + taps) D, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from amphista.cache.static import sent
from amphista.kernels.linear import Product, TorchLinear
from amphista.kernels.parts import Norm, attention_of_any_shape
from amphista.target.attention import Layout, layer_rules
from amphista.target.blocks import scale_of
from amphista.target.experts import Experts
from amphista.target.hidden_states import Taps
from amphista.target.lean_layers import (
    LeanLayer,
    gate_of,
    kind_of_turn,
    num_to_pair,
    rotary_table,
    score_cap,
)
from amphista.target.pages import give_back
from amphista.target.probe_rows import embedded, layers_of
from amphista.target.spans import Span
from amphista.target.spec import LogitTransform, Mix

# From so many scores a sequence on, torch's own attention is faster than two products and a softmax.
FUSED_ATTENTION_SCORES = {
    torch.float64: 1 << 20,
    torch.float32: 1 << 20,
    torch.float16: 1 << 24,
    torch.bfloat16: 1 << 24,
}
# On CUDA torch has no kernel for grouped heads under a mask and repeats keys and values: products, memory permitting.
GROUPED_CUDA_SCORES = 1 << 28


class LayerKV(Protocol):
    """Where a layer's keys and values go."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New rows [B, J, N, E] in, all rows [B, J, S, E] out."""


class NoCache:
    """No cache: a forward sees the rows it is given."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values


class LeanModel:
    """A causal LM as weights and one function."""

    def __init__(self, model: Any, *, product: type[Product] = TorchLinear, release: bool = False) -> None:
        """product: the kernel of all products with weights. release: free the stock model's layers one by one as they
        are read, so that no weight exists twice."""
        config, decoder = model.config.get_text_config(decoder=True), model.get_decoder()
        attention = decoder.layers[0].self_attn
        self.head_size = attention.head_dim
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.embed = decoder.embed_tokens
        self._embedding = self.embed.weight.detach()
        # of what layers read, whoever has embedded it
        self.input_scale = float(getattr(decoder, "embedding_multiplier", 1.0))
        self.embedding_scale = self.input_scale * scale_of(self.embed)
        self.residual_scale = float(getattr(decoder.layers[0], "residual_multiplier", 1.0))
        self.gate = gate_of(decoder.layers[0])
        self.logit_transform, self.score_cap = LogitTransform.from_config(config), score_cap(attention)
        turns = [kind_of_turn(config, layer, index) for index, layer in enumerate(decoder.layers)]
        kinds = list(dict.fromkeys(turns))
        self.num_turns = len(kinds)
        self.num_paired = num_to_pair(attention, decoder.rotary_emb, kinds)
        self.rotary = rotary_table(decoder.rotary_emb, config, kinds, self.head_size, self._embedding.device)
        self._exact = torch.promote_types(self.dtype, torch.float32)  # what is rotated in
        scales = torch.ones(self.num_heads + self.num_key_value_heads, 1, dtype=self._exact)
        scales[: self.num_heads] = attention.scaling
        self._heads_scale = scales.to(self._embedding.device)
        self._norm = Norm.of(decoder.norm)
        rules = layer_rules(model)
        self.rules = list(dict.fromkeys(rules))
        self.layers: list[LeanLayer] = []
        for index, rule in enumerate(rules):
            places = self.rules.index(rule), kinds.index(turns[index])
            self.layers.append(LeanLayer.of(decoder.layers[index], index + 1, *places, self.num_paired, product))
            if release:
                if self.layers[-1].output.is_copy:
                    give_back(*decoder.layers[index].parameters())
                decoder.layers[index] = torch.nn.Identity()
        self.head = product.of(model.get_output_embeddings())  # last: the largest, when the layers have made room

    @property
    def products(self) -> list[Product]:
        """Of all layers, and the LM head."""
        of_layers = [p for layer in self.layers for p in (layer.qkv, layer.output, *layer.mlp.products)]
        return [*of_layers, self.head]

    @property
    def experts(self) -> list[Experts]:
        """Of all layers that have any."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, Experts)]

    @property
    def num_product_bytes(self) -> int:
        """Bytes of the weights of all products."""
        return sum(product.num_bytes for product in self.products)

    @property
    def has_plain_scores(self) -> bool:
        """Whether attention weighs keys by a softmax of their scores, and no more."""
        return self.score_cap is None and self.layers[0].sinks is None

    @property
    def sees_all(self) -> bool:
        """Whether every row of every layer sees all rows before it."""
        return self.rules == [causal_mask_function]

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._embedding.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self._embedding.device
        return device

    @property
    def final_norm(self) -> Tensor:
        """Weight [D] of the norm before the LM head."""
        return self._norm.weight

    @torch.inference_mode()
    def hidden(self, token_ids: Tensor, taps: Taps = (), num_layers: int | None = None) -> Tensor:
        """Post-norm hidden states and taps [B, T, W] of ids [B, T] without a cache, behind all layers or the first."""
        layout = Layout.causal(token_ids.shape[1], self.device)
        self.rotary.reserve(token_ids.shape[1])
        return self.states(token_ids, layout, [[NoCache()] for _ in self.layers[:num_layers]], taps)

    @torch.inference_mode()
    def hidden_of(self, spans: Sequence[Span], taps: Taps = ()) -> Tensor:
        """Post-norm hidden states and taps [N, W] of all spans' rows, side by side."""
        positions = [position for span in spans for position in span.positions]
        self.rotary.reserve(max(positions) + 1)
        turns = self._rotations(sent(positions, self.device))
        each = zip(*(self._attention(span) for span in spans), strict=True)  # by rule, what each span attends with
        probes = None
        for span in spans:
            probes = probes or span.probes
        if probes is not None:
            rows = list(zip(*(layers_of(span, in_pairs=self.num_paired) for span in spans), strict=True))
            return self._states(embedded(self.embed, spans, self.device), turns, list(each), rows, taps)
        rows = list(zip(*(span.cache.layers for span in spans), strict=True))
        token_ids = sent([token for span in spans for token in span.tree.tokens], self.device)
        return self._states(self.embed(token_ids), turns, list(each), rows, taps)

    @torch.inference_mode()
    def states(self, token_ids: Tensor, layout: Layout, rows: Sequence[Sequence[LayerKV]], taps: Taps = ()) -> Tensor:
        """The same [B, N, W] of ids [B, N] at positions there are turns for, with one cache for all; asks the device
        nothing, so that it can be recorded."""
        return self.read(self.embed(token_ids), layout, rows, taps)

    def read(self, inputs: Tensor, layout: Layout, rows: Sequence[Sequence[LayerKV]], taps: Taps = ()) -> Tensor:
        """The same of embeddings [B, N, embedding size]; outside inference mode a gradient passes."""
        shape = (inputs.shape[0], inputs.shape[1])
        turns = self._rotations(layout.positions.expand(shape[0], -1).flatten())
        attention = [[_Attention.of(self, shape, layout.mask(rule))] for rule in self.rules]
        return self._states(inputs.flatten(0, 1), turns, attention, rows, taps).view(*shape, -1)

    def _attention(self, span: Span) -> list[_Attention]:
        """By rule; a mask that hides nothing from a single row is left out."""
        shape = (1, span.tree.num_nodes)
        if shape[1] == 1 and self.sees_all:
            return [_Attention.of(self, shape, None)]
        layout = Layout.of(span, self.device)
        masks = [layout.mask(rule) for rule in self.rules]
        if shape[1] == 1:
            masks = [None if mask is None or bool(mask.all()) else mask for mask in masks]
        return [_Attention.of(self, shape, mask) for mask in masks]

    def _states(
        self,
        inputs: Tensor,
        turns: Sequence[Tensor],
        attention: Sequence[Sequence[_Attention]],
        rows: Sequence[Sequence[LayerKV]],
        taps: Taps,
    ) -> Tensor:
        """Flat rows [N, W] of embeddings. attention: by rule, then by span; rows: by layer, then by span."""
        states, tapped = self.entered(inputs), []
        for layer, caches in zip(self.layers, rows, strict=False):  # either may have been cut
            projected = self._projected(layer, states, turns[layer.turn])
            mixed = _mixed(attention[layer.rule], projected, caches, layer.sinks)
            states = self._behind(layer, states, mixed)
            if layer.number in taps:
                tapped.append(states)
        hidden = self._norm(states)
        return torch.cat([hidden, *tapped], dim=-1) if taps else hidden

    @torch.inference_mode()
    def step(self, token_ids: Tensor, positions: Tensor, mix: Any, caches: Sequence[Any]) -> Tensor:
        """Hidden states [N, D] of one row of each of N sequences. mix: (queries, keys, values, a layer's cache) ->
        [N, H * E]; positions [N] there are turns for. Can be recorded."""
        rows = [[cache] for cache in caches]
        return self._states(self.embed(token_ids), self._rotations(positions), [[mix]], rows, ())

    @torch.inference_mode()
    def read_early(self, token_ids: Tensor, positions: Sequence[int], num_layers: int, mix: Mix) -> list[Tensor]:
        """As `EarlyLayers` says; scaled queries, and keys as the model's caches hold them."""
        self.rotary.reserve(max(positions) + 1)
        turns, residuals = self._rotations(sent(positions, self.device)), [self.entered(self.embed(token_ids))]
        for number, layer in enumerate(self.layers[:num_layers]):
            states = residuals[-1]
            residuals.append(
                self._behind(layer, states, mix(number, *self._projected(layer, states, turns[layer.turn])))
            )
        return residuals

    def first_seen(self, layer: int, position: int) -> int:
        """As `EarlyLayers` says; what a row sees ends with itself, whatever the rule."""
        rule, zero = self.rules[self.layers[layer].rule], torch.zeros((), dtype=torch.int64)
        seen = rule(zero, zero, zero + position, torch.arange(position + 1)).expand(position + 1)
        return position + 1 - int(seen.sum())

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V]."""
        logits = self.head(hidden.reshape(-1, hidden.shape[-1])).view(*hidden.shape[:-1], -1)
        return self.logit_transform(logits)

    def entered(self, inputs: Tensor) -> Tensor:
        """What the first layer reads of embeddings [N, D]."""
        return inputs if self.input_scale == 1.0 else inputs * self.input_scale

    def _projected(self, layer: LeanLayer, states: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, E], keys and values [N, J, E]."""
        heads, key_heads, size = self.num_heads, self.num_key_value_heads, self.head_size
        num_rows, parts = states.shape[0], (heads, key_heads, key_heads)
        projected = layer.qkv(_normed(layer.attention_norm, states)).view(num_rows, -1, size)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys, values = projected.split_with_sizes(parts, 1)
            if layer.query_norm.weight.numel() != size:  # over all heads
                queries, keys = queries.flatten(1), keys.flatten(1)
            normed = layer.query_norm(queries).view(num_rows, -1, size), layer.key_norm(keys).view(num_rows, -1, size)
            projected = torch.cat([*normed, values], dim=1)
        exact = projected if projected.dtype is self._exact else projected.to(self._exact)
        pairs = torch.view_as_complex(exact.view(num_rows, -1, size // 2, 2))
        pairs.narrow(1, 0, heads + key_heads).mul_(turn)  # in place: nobody else reads the projections
        projected = exact if exact.dtype is states.dtype else exact.to(states.dtype)
        queries, keys, values = projected.split_with_sizes(parts, 1)
        return queries, keys, values

    def _behind(self, layer: LeanLayer, states: Tensor, mixed: Tensor) -> Tensor:
        """States behind a layer, of those before it and what its attention gave [N, H * E]."""
        states = self._joined(states, mixed, layer.output, layer.attention_out_norm)
        rows = _normed(layer.mlp_norm, states)
        if isinstance(layer.mlp, Experts):
            return self._added(states, layer.mlp(rows, self.gate), layer.mlp_out_norm)
        return self._joined(states, layer.mlp.inner(rows, self.gate), layer.mlp.down, layer.mlp_out_norm)

    def _joined(self, states: Tensor, rows: Tensor, product: Product, norm: Norm | None) -> Tensor:
        """States [N, D] and a product of rows, normed if there is a norm."""
        if norm is None and self.residual_scale == 1.0:
            return product.added(rows, states)
        return self._added(states, product(rows), norm)

    def _added(self, states: Tensor, added: Tensor, norm: Norm | None) -> Tensor:
        added = _normed(norm, added)
        return states + (added if self.residual_scale == 1.0 else added * self.residual_scale)

    def _rotations(self, positions: Tensor) -> Sequence[Tensor]:
        """What queries and keys at positions [N] are multiplied by, by kind of layer: complex [N, H + J, E / 2]."""
        return [turns[:, None] * self._heads_scale for turns in self.rotary.table[positions].unbind(1)]


def _normed(norm: Norm | None, rows: Tensor) -> Tensor:
    return rows if norm is None else norm(rows)


def _mixed(
    attention: Sequence[_Attention],
    projected: tuple[Tensor, Tensor, Tensor],
    caches: Sequence[LayerKV],
    sinks: Tensor | None,
) -> Tensor:
    """Queries [N, H, E], new keys and values [N, J, E] of all spans -> [N, H * E], each span on its own rows; sinks
    [H]."""
    more = () if sinks is None else (sinks,)
    if len(attention) == 1:
        return attention[0](*projected, caches[0], *more)
    sizes = [one.shape[1] for one in attention]
    parts = zip(attention, caches, *(part.split_with_sizes(sizes) for part in projected), strict=True)
    return torch.cat([one(*rows, cache, *more) for one, cache, *rows in parts])


@dataclass(frozen=True)
class _Attention:
    """Attention of one kind of layer in one forward, of queries scaled already. Query heads of a group share keys and
    values as they lie.

    mask: bool [B or 1, 1, N, S] where torch's own attention is used, else additive [B * J or 1, G * N, S]; None: every
    row sees all (N = 1) or, without a cache, all before it.
    """

    shape: tuple[int, int]
    num_key_value_heads: int
    num_groups: int
    mask: Tensor | None
    is_fused: bool
    cap: float | None

    @classmethod
    def of(cls, model: LeanModel, shape: tuple[int, int], mask: Tensor | None) -> _Attention:
        key_heads, groups = model.num_key_value_heads, model.num_heads // model.num_key_value_heads
        cap = model.score_cap
        if not model.has_plain_scores and mask is None and shape[1] > 1:
            mask = torch.ones(1, 1, shape[1], shape[1], dtype=torch.bool, device=model.device).tril()
        is_fused = mask is None and shape[1] > 1
        if mask is not None and model.has_plain_scores:
            num_scores = shape[1] * model.num_heads * mask.shape[-1]
            repeats = model.device.type == "cuda" and groups > 1
            limit = GROUPED_CUDA_SCORES if repeats else FUSED_ATTENTION_SCORES[model.dtype]
            is_fused = num_scores > limit
        if mask is not None and not is_fused:
            mask = _grouped(mask[:, 0], shape[0] * key_heads, groups, model.dtype)
        return cls(shape, key_heads, groups, mask, is_fused, cap)

    def __call__(
        self, queries: Tensor, keys: Tensor, values: Tensor, rows: LayerKV, sinks: Tensor | None = None
    ) -> Tensor:
        """Queries [B * N, H, E], new keys and values [B * N, J, E] -> [B * N, H * E]."""
        (batch, length), size = self.shape, queries.shape[-1]
        new_keys = keys.view(batch, length, self.num_key_value_heads, size).transpose(1, 2)
        new_values = values.view(batch, length, self.num_key_value_heads, size).transpose(1, 2)
        all_keys, all_values = rows.append(new_keys, new_values)
        if self.is_fused:
            return self._fused(queries, all_keys, all_values)
        return self._grouped(queries, all_keys, all_values, sinks)

    def _fused(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        (batch, length), rows = self.shape, len(queries)
        mixed = attention_of_any_shape(
            queries.view(batch, length, *queries.shape[1:]).transpose(1, 2),
            keys,
            values,
            attn_mask=self.mask,
            is_causal=self.mask is None and length > 1,
            scale=1.0,
            enable_gqa=self.num_groups > 1,
        )
        return mixed.transpose(1, 2).reshape(rows, -1)

    def _grouped(self, queries: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
        """A few rows: two batched products and a softmax cost less than torch's attention and its repeated heads."""
        (batch, length), heads, groups = self.shape, self.num_key_value_heads, self.num_groups
        rows, _, size = queries.shape
        if length > 1:
            queries = queries.view(batch, length, heads, groups, size).permute(0, 2, 3, 1, 4)
        grouped = queries.reshape(batch * heads, groups * length, size)
        keys, values, mask = keys.flatten(0, 1), values.flatten(0, 1), self.mask
        transposed = keys.transpose(1, 2)
        if self.cap is not None:
            scores = torch.tanh(torch.bmm(grouped, transposed) / self.cap) * self.cap
            scores = scores if mask is None else scores + mask
        else:
            scores = torch.bmm(grouped, transposed) if mask is None else torch.baddbmm(mask, grouped, transposed)
        if sinks is not None:  # a score of each head beside those of its keys, which weighs nothing
            of_rows = sinks.to(scores.dtype).view(heads, groups, 1).expand(-1, -1, length).reshape(heads, -1, 1)
            scores = torch.cat([scores, of_rows.repeat(batch, 1, 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.bmm(weights if sinks is None else weights[..., :-1], values)
        if length > 1:
            mixed = mixed.view(batch, heads, groups, length, size).permute(0, 3, 1, 2, 4)
        return mixed.reshape(rows, -1)


def _grouped(visible: Tensor, num_pairs: int, groups: int, dtype: torch.dtype) -> Tensor:
    """bool [B or 1, N, S] -> additive [B * J or 1, G * N, S]: the rows of a group one after the other."""
    added = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
    if len(visible) == 1:
        return added.repeat(1, groups, 1)
    batch, rows, keys = visible.shape
    spread = added[:, None, None].expand(batch, num_pairs // batch, groups, rows, keys)
    return spread.reshape(num_pairs, groups * rows, keys)
