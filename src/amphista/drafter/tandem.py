"""A small model beside the target, after Tandem Transformers (arXiv 2402.08644): its layers see the target's states.

    K_l(s), V_l(s) = Layer_l's keys and values of P_l n_l(a_l(s)),  s <= t       a_l: states of the target, one a layer
    y_{t+i}        = Layers(W n_E(E(x_{t+i})) at t+i | K, V up to t, y_{t+1} .. y_{t+i})
    z_i            = LM(n_o(y_{t+i}))                                            scores x_{t+1+i}

What the text says up to t comes from the target alone; of the small model nothing is ever cached. Likely, from the
abstract and a reader's summary: layers of a small model that attend to projected states of the target, and a drafter
for speculative decoding made of it. Ours: one layer a source (`taps`, then h_t), their sizes, norms, the random start
(the published one is pretrained), objectives. Published too, and not here: decoding blocks by the small model alone,
whose tokens would be its own, and a router for the length of blocks, which `tree auto` stands for.

Shapes: B sequences, T rows, P selected rows, n paths, i drafted rows of a path, L layers, J key-value heads, S rows of
a context, E head size, D hidden size, W = L * D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amphista.drafter.base import MAX_SIZE, DrafterConfig, DrafterState, check_range, check_taps
from amphista.drafter.layers import LayerCache, LayerSizes, RMSNorm, TransformerLayer, rotary_tables
from amphista.drafter.path_rows import Contexts, step
from amphista.drafter.rounds import Paths, SequentialHeads
from amphista.target.spec import SharedWeights, TargetSpec

Rows = Sequence[tuple[Tensor, Tensor]]  # keys and values [J, S, E] of each sequence


@dataclass(frozen=True, kw_only=True)
class TandemConfig(DrafterConfig):
    """`taps`: after which of the target's layers states are read by all layers but the last, one each; the last reads
    h_t. `reads_target` off: layers see their own rows alone. `intermediate_size` defaults to the target's."""

    num_heads: int = 4
    taps: tuple[int, ...] = ()
    reads_target: bool = True
    intermediate_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("intermediate_size", self.intermediate_size, 1, MAX_SIZE)


@dataclass(frozen=True)
class TandemPaths(Paths):
    """Whose each path is, `owners` [n], ascending; rows of the context before it, `seen` [n]; keys and values
    [n, L, J, i, E] of its own rows. contexts: of each layer."""

    owners: Tensor
    seen: Tensor
    keys: Tensor
    values: Tensor
    contexts: Sequence[Rows]


class Tandem(SequentialHeads[TandemPaths]):
    """The full drafter; see the module's equations."""

    name = "tandem"
    config: TandemConfig

    def __init__(self, config: TandemConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        super().__init__(config, spec, shared)
        check_taps(config.taps, spec.num_layers)
        self.taps, size, number = config.taps, spec.hidden_size, len(config.taps) + 1
        self.embedding_norm = RMSNorm(spec.embedding_size, spec.norm_eps)
        self.widen = nn.Linear(spec.embedding_size, size, bias=False)
        self.source_norms = nn.ModuleList(RMSNorm(size, spec.norm_eps) for _ in range(number))
        self.sources = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(number))
        sizes = LayerSizes.of(spec, config.intermediate_size)
        self.layers = nn.ModuleList(TransformerLayer(sizes) for _ in range(number))
        self.output_norm = RMSNorm(size, spec.norm_eps)
        for linear in (self.widen, *self.sources):
            nn.init.eye_(linear.weight)

    def match_scale(self, hidden_rms: float) -> None:
        """The LM head expects post-norm states of a certain size: give the output norm the measured rms of h."""
        nn.init.constant_(self.output_norm.weight, hidden_rms)

    def _projected(self, hidden: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values [B, J, T, E] of hidden states and taps [B, T, W] at positions [1, T]."""
        last, *taps = hidden.split(self.spec.hidden_size, dim=-1)
        found = []
        parts = (self.source_norms, self.sources, self.layers, [*taps, last])
        for norm, project, layer, source in zip(*parts, strict=True):
            assert isinstance(layer, TransformerLayer)
            rotary = rotary_tables(positions, layer.sizes.head_size, layer.sizes.rope_theta)
            found.append(layer.attention.keys_values(project(norm(source)), rotary))
        return found

    def _begun(self, owners: Tensor, seen: Tensor, contexts: Sequence[Rows]) -> TandemPaths:
        """Paths that have read nothing."""
        shape = (len(owners), len(self.layers), self.spec.num_key_value_heads, 0, self.spec.head_size)
        none = torch.empty(shape, dtype=self.dtype, device=owners.device)
        return TandemPaths(none.new_empty(len(owners), 0), owners, seen, none, none, contexts)

    def first(self, states: Sequence[DrafterState]) -> TandemPaths:
        contexts = []
        for caches in zip(*(state.caches for state in states), strict=True):
            rows = [cache.storage[:, 0, :, : s.num_rows] for cache, s in zip(caches, states, strict=True)]
            contexts.append([(row[0], row[1]) for row in rows])
        seen = torch.tensor([state.num_rows for state in states], device=self.device)
        pending = torch.stack([state.pending for state in states if state.pending is not None])
        return self.next(self._begun(torch.arange(len(states), device=self.device), seen, contexts), pending)

    def first_along(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> TandemPaths:
        length = hidden.shape[1]
        projected = self._projected(hidden, torch.arange(length, device=hidden.device)[None])
        contexts = [list(zip(keys, values, strict=True)) for keys, values in projected]
        begun = self._begun(select // length, select % length + 1, contexts)
        return self.next(begun, next_ids.flatten().index_select(0, select))

    def next(self, paths: TandemPaths, tokens: Tensor) -> TandemPaths:
        x = self.widen(self.embedding_norm(self._shared.embed(tokens).to(self.dtype)))[:, None]
        seen, made = paths.seen * int(self.config.reads_target), []
        for number, (layer, rows) in enumerate(zip(self.layers, paths.contexts, strict=True)):
            assert isinstance(layer, TransformerLayer)
            own = paths.keys[:, number].to(x.dtype), paths.values[:, number].to(x.dtype)
            x, *both = step(layer, x, own, Contexts(rows, paths.owners, seen, paths.seen))
            made.append(both)
        keys, values = (torch.stack(column, dim=1) for column in zip(*made, strict=True))
        return TandemPaths(self.output_norm(x[:, 0]), paths.owners, paths.seen, keys, values, paths.contexts)

    @property
    def row_bytes(self) -> int:
        return 2 * len(self.layers) * self.spec.num_key_value_heads * self.spec.head_size * self.dtype.itemsize

    def start(self) -> DrafterState:
        return DrafterState(caches=[LayerCache() for _ in self.layers])

    def feed(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        positions = torch.arange(state.num_rows, state.num_rows + len(hidden), device=hidden.device)[None]
        projected = self._projected(hidden.to(self.dtype)[None], positions)
        for cache, (keys, values) in zip(state.caches, projected, strict=True):
            cache.trim(state.num_rows)  # what a commit that was broken off has left
            cache.append(keys, values)
        state.pending = next_ids[-1]
        state.num_rows += len(hidden)

    def trim(self, state: DrafterState, num_rows: int) -> None:
        state.num_rows = min(state.num_rows, num_rows)
        for cache in state.caches:
            cache.trim(num_rows)
