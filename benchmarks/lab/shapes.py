"""Targets with random weights at the dimensions of known models: their speed can be measured without their weights.

Dimensions: Llama (arXiv 2302.13971, table 2) for 7b, 13b and 33b (Vicuna has the same), Llama 2 (arXiv 2307.09288) for
70b. What such a target writes means nothing; how long its forward takes does not depend on the values in its matrices.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from amphista.drafter.checkpoint import DRAFTERS, make_drafter
from amphista.drafter.scoring import ScoringDrafter
from amphista.errors import CapacityError, ConfigError
from amphista.evaluation.latency import LatencyConfig, Measures, Report, derived, measure_latency
from amphista.target.gguf import Progress
from amphista.target.loading import DTYPES, device_of
from amphista.target.pages import free_bytes
from amphista.target.target import Target

logger = logging.getLogger("amphista")

VOCAB_SIZE = 32000
MAX_POSITIONS = 4096
RESERVE = 0.1  # of the free memory: activations, logits, the allocator's own


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The dimensions of a Llama-like model."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = VOCAB_SIZE

    @property
    def parameters_per_layer(self) -> int:
        """Weights of one decoder layer: attention, gated MLP, two norms."""
        kv_size = self.hidden_size // self.num_attention_heads * self.num_key_value_heads
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * kv_size
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    def num_parameters(self, num_layers: int | None = None) -> int:
        """Weights of the model, or of one cut to `num_layers` layers: layers, embedding, LM head, final norm."""
        layers = self.num_layers if num_layers is None else num_layers
        return layers * self.parameters_per_layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size

    def cache_values_per_row(self, num_layers: int | None = None) -> int:
        """Keys and values that one token leaves in the cache."""
        layers = self.num_layers if num_layers is None else num_layers
        return 2 * layers * self.hidden_size // self.num_attention_heads * self.num_key_value_heads


def _llama(layers: int, hidden: int, heads: int, intermediate: int, kv_heads: int | None = None) -> Shape:
    return Shape(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        intermediate_size=intermediate,
    )


SHAPES = {
    "llama-7b": _llama(32, 4096, 32, 11008),
    "llama-13b": _llama(40, 5120, 40, 13824),
    "llama-33b": _llama(60, 6656, 52, 17920),
    "llama-70b": _llama(80, 8192, 64, 28672, kv_heads=8),
}


def shape_named(name: str) -> Shape:
    """The shape of that name; raises ConfigError, naming those there are."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}: expected one of {', '.join(SHAPES)}")
    return SHAPES[name]


def random_target(
    name: str,
    *,
    num_layers: int | None = None,
    cache_rows: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    fast: bool = False,
    progress: Progress = logger.info,
) -> Target:
    """A target of a known shape with random weights, whole or cut to its first `num_layers` layers.

    cache_rows: rows (sequences x context) that will be cached, counted into the memory it needs. dtype: a key of
    DTYPES; default float32 on CPU, bfloat16 elsewhere. fast: on the fast path, as a loaded one is. Its size is told
    before anything is allocated; raises ConfigError where it does not fit.
    """
    shape = shape_named(name)
    layers = shape.num_layers if num_layers is None else num_layers
    if not 1 <= layers <= shape.num_layers:
        raise ConfigError(f"--layers is {num_layers}: {name} has {shape.num_layers} layers, give 1..{shape.num_layers}")
    place = device_of(device)
    kind = dtype or ("float32" if place.type == "cpu" else "bfloat16")
    if kind not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    _check_fits(name, shape, layers, cache_rows, place, DTYPES[kind], progress)
    target = Target(_random_model(shape, layers, place, DTYPES[kind]), name=name)
    if fast:
        target.speed_up(release=True)
    return target


def _check_fits(
    name: str, shape: Shape, layers: int, cache_rows: int, place: torch.device, dtype: torch.dtype, progress: Progress
) -> None:
    size = dtype.itemsize
    weights = shape.num_parameters(layers) * size
    needed = weights + cache_rows * shape.cache_values_per_row(layers) * size
    free = free_bytes(place)
    part = "" if layers == shape.num_layers else f", {layers} of its {shape.num_layers} layers"
    told = (
        f"{name}{part}: {shape.num_parameters(layers) / 1e9:.2f} G random weights in "
        f"{str(dtype).removeprefix('torch.')} take {weights / 1e9:.1f} GB, with the caches {needed / 1e9:.1f} GB"
    )
    if needed > free * (1 - RESERVE):
        layer = (shape.parameters_per_layer + cache_rows * shape.cache_values_per_row(1)) * size
        fitting = int((free * (1 - RESERVE) - shape.num_parameters(0) * size) // layer)
        fitting = min(fitting, shape.num_layers)
        advice = f"measure fewer layers with --layers {fitting}" if fitting >= 1 else "not even one layer fits"
        lower = "" if size <= 2 else ", or halve them with --dtype bfloat16"
        raise ConfigError(f"{told}; {free / 1e9:.1f} GB are free on {place}: {advice}{lower}")
    progress(told)


def _random_model(shape: Shape, layers: int, place: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )
    try:
        with place:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CapacityError(f"{place} ran out of memory at {layers} layers: give fewer --layers") from error


def random_drafter(kind: str, target: Target, draft_vocab: int | None = None) -> ScoringDrafter:
    """A drafter with random weights, for timing; raises ConfigError where there is no room for it.

    kind: a key of DRAFTERS. draft_vocab: how many tokens it scores, default all.
    """
    config = DRAFTERS[kind][0](draft_vocab=draft_vocab)
    with torch.device("meta"):
        sketch = make_drafter(kind, config, target.spec, target.shared)
    weights = sum(parameter.numel() for parameter in sketch.parameters())
    needed, free = weights * torch.float32.itemsize, free_bytes(target.device)  # made in float32, then converted
    if needed > free:
        raise ConfigError(
            f"a {kind} drafter with {weights / 1e6:.0f} M weights needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
            "free: leave it out of --drafters"
        )
    with target.device:
        drafter = make_drafter(kind, config, target.spec, target.shared)
    frozen: ScoringDrafter = drafter.to(dtype=target.dtype).eval().requires_grad_(False)
    return frozen.freeze(native=target.is_native)


def measure_shape(
    name: str,
    num_layers: int | None,
    config: LatencyConfig,
    kinds: Sequence[str],
    draft_vocab: int | None = None,
    report: Report | None = None,
    **settings: Any,
) -> tuple[Target, Measures]:
    """The latency of a shape, measured whole, or on `num_layers` of its layers and scaled up; and the target measured.

    Each layer costs the same, so what a forward of several layers takes above that of one is the cost of the others.
    kinds: drafters to time, with random weights. settings: device, dtype and fast, as for `random_target`.
    """
    whole, rows = shape_named(name).num_layers, 2 * (max(config.contexts) + max(config.nodes))
    scaled = num_layers is not None and num_layers < whole
    if scaled and num_layers == 1:
        raise ConfigError("--layers is 1: give at least 2, since the cost of a layer is the difference of two forwards")
    single = measure_latency(random_target(name, num_layers=1, cache_rows=rows, **settings), config) if scaled else None
    target = random_target(name, num_layers=num_layers, cache_rows=rows, **settings)
    record = measure_latency(
        target, config, {kind: random_drafter(kind, target, draft_vocab) for kind in kinds}, report
    )
    if single is not None and num_layers is not None:
        for row, first in zip(record["verify"], single["verify"], strict=True):
            row["measured_ms"] = row["ms"]
            row["ms"] = first["ms"] + (whole - 1) * (row["ms"] - first["ms"]) / (num_layers - 1)
        record |= derived(record["verify"], record["draft"])
    return target, record | {"num_layers": whole, "measured_layers": num_layers or whole}
