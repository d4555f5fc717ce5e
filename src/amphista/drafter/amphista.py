"""Amphista (arXiv 2406.13170): staged adaptation layers, drafting heads, bi-directional auto-embedding block.

    stage 1   a1_t = SA_1(W1 [n_h(h_t) ; n_E(E(x_{t+1}))])     causal layer, own cache over the context
                     with taps also n_i(tap_i(t)), each with a norm of its own
    stage 2   a2_t = SA_2(W2 [n_1(a1_t) ; n_E(E(x_{t+1}))])
    heads     e_k  = MLP_k(a1_t) for k <= stage_split, MLP_k(a2_t) above
    block     o    = Encoder([e_1 .. e_K] + PE)                 no causal mask: every head sees every head
    logits    z_k  = LM(n_o(o_k))                               the target's own frozen LM head

No code was ever published. Certain are the bi-directional block and the staged adaptation; two causal layers, the stage
split and the shared LM head are likely; the norms and K = 5 are ours. Every ablation of the paper is a switch of
`AmphistaConfig`, on this one code path. Not in the paper: taps, the target's states after earlier layers, which EAGLE-3
(arXiv 2503.01840) fuses so; their part of W1 starts at 0, where they change nothing.

Shapes: B sequences, T rows, P selected rows, K heads, D hidden size, W = (1 + taps) D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amphista.drafter.base import MAX_LAYERS, MAX_SIZE, DrafterState, check_range, check_taps
from amphista.drafter.heads import ParallelConfig, ParallelHeads
from amphista.drafter.layers import LayerCache, LayerSizes, ResidualBlock, RMSNorm, RowCache, TransformerLayer
from amphista.drafter.native_drafter import Modules
from amphista.drafter.scoring import StateOf
from amphista.drafter.staged import StagedAdaptation
from amphista.errors import ConfigError
from amphista.native.drafting import SLOT_MASKS, SlotMask
from amphista.target.spec import SharedWeights, TargetSpec

POSITION_START_STD = 0.02  # small against the unit rms of the slots: every head starts close to LM(h_t)


@dataclass(frozen=True, kw_only=True)
class AmphistaConfig(ParallelConfig):
    """The paper's model and its ablations.

    `stages` 0, 1 or 2 staged adaptation layers (0: heads read the normed h_t, nothing else); heads k <= `stage_split`
    read stage 1 (default floor(K/2)). `taps`: after which of the target's layers stage 1 reads states, too.
    `slot_mask`: which slots a slot sees in the block, all, those up to its own, or only its own: then the block is a
    layer for each slot alone, with as many weights. `intermediate_size` and `encoder_intermediate_size` default to the
    target's.
    """

    stages: int = 2
    stage_split: int | None = None
    auto_embedding: bool = True
    slot_mask: SlotMask = "bidirectional"
    position_encoding: bool = True
    num_encoder_layers: int = 1
    intermediate_size: int | None = None
    encoder_intermediate_size: int | None = None
    taps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("stages", self.stages, 0, 2)
        check_range("stage_split", self.stage_split, 0, self.num_heads)
        if self.taps and not self.stages:
            raise ConfigError("taps are read by the first stage, and stages is 0: expected 1 or 2")
        if self.slot_mask not in SLOT_MASKS:
            raise ConfigError(f"slot_mask is {self.slot_mask!r}: expected one of {', '.join(SLOT_MASKS)}")
        check_range("num_encoder_layers", self.num_encoder_layers, 1, MAX_LAYERS)  # without: auto_embedding off
        check_range("intermediate_size", self.intermediate_size, 1, MAX_SIZE)
        check_range("encoder_intermediate_size", self.encoder_intermediate_size, 1, MAX_SIZE)


class AutoEmbedding(nn.Module):
    """The bi-directional block over the K head slots."""

    def __init__(self, config: AmphistaConfig, sizes: LayerSizes) -> None:
        super().__init__()
        self.position = (
            nn.Parameter(torch.randn(config.num_heads, sizes.hidden_size) * POSITION_START_STD)
            if config.position_encoding
            else None
        )
        self.layers = nn.ModuleList(TransformerLayer(sizes) for _ in range(config.num_encoder_layers))
        self.slot_mask = config.slot_mask

    def forward(self, slots: Tensor) -> Tensor:
        """Slots [P, K, D] -> [P, K, D]."""
        slots = self._placed(slots)
        for layer in self.layers:
            slots = self._seen_by(layer, slots)
        return slots

    def _seen_by(self, layer: nn.Module, slots: Tensor) -> Tensor:
        if self.slot_mask == "own":  # each a sequence of its own
            seen: Tensor = layer(slots.flatten(0, 1)[:, None]).view_as(slots)
        else:
            seen = layer(slots, is_causal=self.slot_mask == "causal")
        return seen

    def one_by_one(self, slots: Tensor) -> StateOf:
        """The same, a slot at a time and only of the rows that are asked for; the last layer works for these alone."""
        slots = self._placed(slots)
        *before, last = self.layers
        for layer in before:
            slots = self._seen_by(layer, slots)
        assert isinstance(last, TransformerLayer)
        keys, values = last.keys_values(slots)
        by_slot = slots.unbind(1)

        def state(slot: int, rows: Tensor) -> Tensor:
            first = slot if self.slot_mask == "own" else 0
            end = len(by_slot) if self.slot_mask == "bidirectional" else slot + 1
            some_keys, some_values = (some[:, :, first:end].index_select(0, rows) for some in (keys, values))
            return last.look_up(by_slot[slot].index_select(0, rows), some_keys, some_values)

        return state

    def _placed(self, slots: Tensor) -> Tensor:
        return slots if self.position is None else slots + self.position.to(slots.dtype)


class Amphista(ParallelHeads):
    """The full drafter; see the module's equations."""

    name = "amphista"
    config: AmphistaConfig

    def __init__(self, config: AmphistaConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        super().__init__(config, spec, shared)
        check_taps(config.taps, spec.num_layers)
        self.taps = config.taps
        self.split = config.num_heads // 2 if config.stage_split is None else config.stage_split
        sizes = LayerSizes.of(spec, config.intermediate_size)
        self.embedding_norm = RMSNorm(spec.embedding_size, spec.norm_eps) if config.stages else None
        self.tap_norms = nn.ModuleList(RMSNorm(spec.hidden_size, spec.norm_eps) for _ in config.taps)
        beside = [spec.embedding_size + len(config.taps) * spec.hidden_size, spec.embedding_size][: config.stages]
        self.stages = nn.ModuleList(StagedAdaptation(sizes, size) for size in beside)
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.norm_eps) if config.stages == 0 else None
        self.heads = nn.ModuleList(ResidualBlock(spec.hidden_size) for _ in range(config.num_heads))
        encoder_sizes = LayerSizes.of(spec, config.encoder_intermediate_size)
        self.auto_embedding = AutoEmbedding(config, encoder_sizes) if config.auto_embedding else None
        self.output_norm = RMSNorm(spec.hidden_size, spec.norm_eps)

    def match_scale(self, hidden_rms: float) -> None:
        """The LM head expects post-norm states of a certain size: give the output norm the measured rms of h."""
        nn.init.constant_(self.output_norm.weight, hidden_rms)

    def features(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> list[Tensor]:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        low, high = self.adapt(hidden, next_ids, positions, None, select)
        return [high if low is high else low.flatten(0, 1).index_select(0, select), high]

    def head_states(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> Tensor:
        return self._heads(self.features(hidden, next_ids, select))

    def states_one_by_one(self, features: list[Tensor]) -> StateOf:
        slots = torch.stack(self._slots(features), dim=-2)
        if self.auto_embedding is None:
            return lambda head, rows: self.output_norm(slots[:, head].index_select(0, rows))
        state = self.auto_embedding.one_by_one(slots)
        return lambda head, rows: self.output_norm(state(head, rows))

    def adapt(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        positions: Tensor,
        caches: Sequence[RowCache] | None,
        select: Tensor | None = None,
    ) -> list[Tensor]:
        """What the heads below and above the split read of hidden states and taps [B, T, W], each [B, T, D].

        select: flat rows [P] of which alone the last stage gives its output, [P, D].
        """
        if self.hidden_norm is not None or self.embedding_norm is None:
            assert self.hidden_norm is not None
            return [self.hidden_norm(hidden if select is None else hidden.flatten(0, 1).index_select(0, select))] * 2
        embedded = self.embedding_norm(self._shared.embed(next_ids).to(hidden.dtype))
        outputs = []
        x, beside = hidden, embedded
        if self.taps:
            x, *taps = hidden.split(self.spec.hidden_size, dim=-1)
            normed = [norm(tap) for norm, tap in zip(self.tap_norms, taps, strict=True)]
            beside = torch.cat([embedded, *normed], dim=-1)
        for index, stage in enumerate(self.stages):
            is_last = index == len(self.stages) - 1
            cache = None if caches is None else caches[index]
            x = stage(x, embedded if index else beside, positions, cache, select if is_last else None)
            outputs.append(x)
        return [outputs[0], outputs[-1]]

    def _slots(self, stages: list[Tensor]) -> list[Tensor]:
        return [head(stages[k >= self.split]) for k, head in enumerate(self.heads)]

    def _heads(self, stages: list[Tensor]) -> Tensor:
        states = torch.stack(self._slots(stages), dim=-2)
        if self.auto_embedding is not None:
            states = self.auto_embedding(states)
        normed: Tensor = self.output_norm(states)
        return normed

    def parts(self) -> Modules:
        block = self.auto_embedding
        return Modules(
            sizes=LayerSizes.of(self.spec, self.config.intermediate_size),
            blocks=[[head] for head in self.heads],
            split=self.split if len(self.stages) > 1 else 0,
            stages=[(stage.state_norm, stage.fuse, stage.layer) for stage in self.stages],
            tap_norms=list(self.tap_norms),
            encoder=[] if block is None else list(block.layers),
            slot_mask=self.config.slot_mask,
            slot_positions=None if block is None else block.position,
            embedding_norm=self.embedding_norm,
            hidden_norm=self.hidden_norm,
            output_norm=self.output_norm,
        )

    @property
    def row_bytes(self) -> int:
        return 2 * self.config.stages * self.spec.num_key_value_heads * self.spec.head_size * self.dtype.itemsize

    def start_rows(self) -> DrafterState:
        return DrafterState(caches=[LayerCache() for _ in range(self.config.stages)])

    def feed(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        for cache in state.caches:
            cache.trim(state.num_rows)  # what a commit that was broken off has left
        hidden = hidden.to(self.dtype)
        positions = torch.arange(state.num_rows, state.num_rows + len(hidden), device=hidden.device)[None]
        stages = self.adapt(hidden[None], next_ids[None], positions, state.caches)
        state.features = [stage[:, -1] for stage in stages]
        state.num_rows += len(hidden)

    @torch.inference_mode()
    def draft_states(self, states: Sequence[DrafterState]) -> Tensor:
        return self._heads(
            [torch.cat(features) for features in zip(*(state.features for state in states), strict=True)]
        )

    def trim(self, state: DrafterState, num_rows: int) -> None:
        state.num_rows = min(state.num_rows, num_rows)
        for cache in state.caches:
            cache.trim(num_rows)
