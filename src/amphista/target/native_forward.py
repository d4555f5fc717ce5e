"""The C step (amphista.native) over the lean form's own weights: spans of token ids and parents on `KVCache`s.

On a CPU, in float32, bfloat16, 8 bits or a GGUF file's own blocks. The torch form reads the same weights
and the same cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from amphista.cache.static import KVCache
from amphista.errors import NativeError
from amphista.kernels.linear import Product, TorchLinear
from amphista.kernels.parts import Norm
from amphista.native.build import load
from amphista.native.layers import DecoderShape, NativeLayer
from amphista.native.step import NativeModel, NativeOutput, NativeProbes, NativeSpan
from amphista.target.attention import Rule
from amphista.target.blocks import GGUF, BlockedLinear, BlockLinear, CoarseBlockLinear, native_of
from amphista.target.experts import all_taken
from amphista.target.hidden_states import Taps
from amphista.target.lean import LeanModel
from amphista.target.lean_layers import LeanLayer
from amphista.target.probe_rows import tails
from amphista.target.products import NativeLinear, PlainLinear, RoundedLinear, native_weight
from amphista.target.spans import Span
from amphista.target.spec import LogitTransform, Probes
from amphista.tree.token_tree import TokenTree

# Of the hidden states' scale, fast against stock (whose norms are of float32 whatever its weights are).
PROBE_TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "int8": 0.3, GGUF: 1e-4}


def tolerance_of(type_name: str, products: Sequence[Product]) -> float:
    """How far two forms of a model may differ, by the type of weights and how the fast form multiplies by them."""
    is_packed = any(product.is_packed for product in products if isinstance(product, NativeLinear))
    if type_name == GGUF and is_packed:  # rows in 16 bits; widened, blocks are float32
        return 2e-3
    return PROBE_TOLERANCE[type_name]


def product_of(head: object, *, int8: bool, native: bool) -> type[Product]:
    """The kernel of a fast form's products, by the stock model's LM head and whether the C step shall read them."""
    if isinstance(head, BlockedLinear):
        return CoarseBlockLinear if int8 else BlockLinear
    return (RoundedLinear if int8 else PlainLinear) if native else TorchLinear


def windows_of(lean: LeanModel, num_positions: int) -> list[int | None]:
    """How many positions each layer's rows see, themselves included, None for all: found by asking the layer's rule.

    raises NativeError for a rule that is neither causal nor a window.
    """
    windows = [_window(rule, num_positions) for rule in lean.rules]
    return [windows[layer.rule] for layer in lean.layers]


def _window(rule: Rule, num_positions: int) -> int | None:
    keys = torch.arange(num_positions)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    last = num_positions - 1
    size = int((rule(zero, zero, zero + last, keys[None, None, None]) & (keys <= last)).sum())
    for query in {0, 1, size - 1, size, last // 2, last}:
        place = min(query, last)
        seen = rule(zero, zero, zero + place, keys[None, None, None]).expand(1, 1, 1, num_positions)
        if not torch.equal(seen.flatten(), (keys <= place) & (place - keys < size)):
            raise NativeError("a layer's attention is neither causal nor within a window")
    return None if size == num_positions else size


class NativeForward:
    """The forward of a lean model whose products are made for it, in C. raises NativeError."""

    def __init__(self, lean: LeanModel, windows: Sequence[int | None], *, flags: tuple[str, ...] | None = None) -> None:
        """windows: of each layer, positions a row sees, itself included; None: all."""
        if lean.device.type != "cpu":
            raise NativeError(f"the C step runs on a CPU, not on {lean.device.type}")
        self._lean = lean
        self._transform = None if lean.logit_transform == LogitTransform() else lean.logit_transform
        of_heads = lean.layers[0].query_norm
        shape = DecoderShape(
            lean.num_heads,
            lean.num_key_value_heads,
            lean.head_size,
            lean._norm.eps,
            float(lean._heads_scale[0]),
            residual_scale=lean.residual_scale,
            num_turns=lean.num_turns,
            has_wide_norms=of_heads is not None and of_heads.weight.numel() != lean.head_size,
            has_gelu=lean.gate.by_gelu,
            gate_slope=lean.gate.slope,
            gate_limit=lean.gate.limit,
            score_cap=lean.score_cap or 0.0,
            embedding_scale=lean.embedding_scale,
            input_scale=lean.input_scale,
        )
        self.layers = [self._layer(layer, window) for layer, window in zip(lean.layers, windows, strict=True)]
        self.head, embedding = native_weight(lean.head), native_of(lean.embed)
        self.model = NativeModel(shape, self.layers, lean._norm.weight, embedding, self.head, flags=flags)
        self._probes: tuple[Probes, NativeProbes] | None = None
        self._row = torch.empty(1, lean.num_key_value_heads, 0, lean.head_size, dtype=self.model.cache_dtype)

    def _layer(self, layer: LeanLayer, window: int | None) -> NativeLayer:
        return NativeLayer(
            _weight_of(layer.attention_norm),
            native_weight(layer.qkv),
            _weight_of(layer.query_norm),
            _weight_of(layer.key_norm),
            native_weight(layer.output),
            _weight_of(layer.mlp_norm),
            layer.mlp.native(),
            window,
            _weight_of(layer.attention_out_norm),
            _weight_of(layer.mlp_out_norm),
            layer.turn,
            layer.sinks,
        )

    def __call__(self, spans: Sequence[Span], wanted: Sequence[int] | None = None, taps: Taps = ()) -> NativeOutput:
        """One forward over the flat row of all spans' nodes, which their caches then hold behind the committed rows.

        wanted: rows whose logits are asked for; None: all.
        """
        native, furthest, num_rows, probes, has_logits = [], 0, 0, None, False
        for span in spans:
            has_logits = has_logits or not span.only_choices
            probes = probes or span.probes
            num_rows += span.tree.num_nodes
            end = span.num_past + span.tree.num_nodes
            furthest = max(furthest, end)
            rows = span.cache.in_one_piece(end, self._row)
            native.append(NativeSpan(span.tree.tokens, span.tree.parents, rows, span.num_past))
        turns = self._lean.rotary.reserve(furthest)
        lent = None if probes is None else self._lent(probes)
        output = self.model.forward(
            native, range(num_rows) if wanted is None else wanted, turns, taps, lent, has_logits=has_logits
        )
        for span in spans:
            end = span.num_past + span.tree.num_nodes
            for layer in span.cache.layers:
                layer.num_rows = end
        if has_logits and self._transform is not None:
            self._transform.apply(output.logits)
        return output

    def _lent(self, probes: Probes) -> NativeProbes:
        """A drafter's probes as the C step reads them, made once."""
        if self._probes is None or self._probes[0] is not probes:
            prefixes = tails(probes.prefix, len(self.layers), in_pairs=self._lean.num_paired)
            rows = [torch.stack(part) for part in zip(*prefixes, strict=True)]
            self._probes = probes, NativeProbes(probes.inputs, torch.cat(rows).to(self.model.cache_dtype))
        return self._probes[1]

    @torch.inference_mode()
    def check(self, allowed: float) -> None:
        """Raise NativeError unless hidden states are near the torch form's, by their scale, and a node of a tree has
        the logits that it has alone, to the bit."""
        num_layers, size = len(self.layers), self.model.vocab_size
        ids = [token % size for token in (7, 8, size // 3, size // 2, size - 1)]
        prompt, tree = TokenTree.chain(ids), TokenTree(ids[:3], [-1, 0, 0])
        path = TokenTree.chain([ids[0], ids[2]])
        mine, theirs = KVCache(num_layers), KVCache(num_layers)
        with all_taken([*self._lean.experts, *self.model.experts]):
            self([Span(prompt, mine)])
            self._lean.hidden_of([Span(prompt, theirs)])
        for cache in (mine, theirs):
            cache.commit(range(len(ids)))
        found = self([Span(tree, mine)])
        mine.trim(len(ids))
        with all_taken([*self._lean.experts, *self.model.experts]):
            expected = self._lean.hidden_of([Span(path, theirs)]).float()
            difference = float((self([Span(tree, mine)]).hidden[[0, 2]] - expected).abs().max() / expected.abs().max())
        if not difference <= allowed:
            raise NativeError(f"it differs from the torch form by {difference:.2g} of the hidden states' scale")
        mine.trim(len(ids))
        alone = self([Span(path, mine)])
        if not torch.equal(alone.logits[1], found.logits[2]):
            raise NativeError("a row's logits depend on what is beside it")


def why_not_native(name: str, device: torch.device, dtype: torch.dtype, *, is_static: bool) -> str | None:
    """Why the C step cannot be had for such a target here, None where it can: said in a line, too."""
    try:
        if is_static:
            raise NativeError("fixed shapes are verified")
        if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
            raise NativeError(f"it has no weights of {str(dtype).removeprefix('torch.')} on {device.type} devices")
        load()
    except NativeError as error:
        return _said(name, error)
    return None


def native_form(
    name: str, lean: LeanModel, num_positions: int, allowed: float
) -> tuple[NativeForward | None, str | None]:
    """The C form of a lean model, tried (`NativeForward.check`), or why there is none: said in a line, too."""
    try:
        made = NativeForward(lean, windows_of(lean, num_positions))
        made.check(allowed)
    except NativeError as error:
        return None, _said(name, error)
    return made, None


def _said(name: str, error: NativeError) -> str:
    logging.getLogger("amphista").warning("%s decodes without the C step, slower: %s", name, error)
    return str(error)


def _weight_of(norm: Norm | None) -> torch.Tensor | None:
    return None if norm is None else norm.weight
