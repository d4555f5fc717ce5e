"""A drafter after EAGLE (arXiv 2401.15077, 2406.16858): one layer that goes on from its own states, token by token.

    u_j     = W [n_g(h_j) ; n_E(E(x_{j+1}))] + F [n_i(tap_i(j))]                            rows j <= t, of the context
    g_{t+1} = Layer(u_t at t | u_{<=t})
    g_{t+i} = Layer(W [n_g(g_{t+i-1}) ; n_E(E(x_{t+i}))] at t+i-1 | u_{<=t}, its own path)            drafted, i > 1
    z_i     = LM(n_o(g_{t+i}))                                                             scores x_{t+1+i}

The context is cached as that of a staged adaptation layer is: its keys come from the target's own states. Certain:
the fused state and token, one decoder layer, its output fed back; trees chosen by the drafter's own confidence are
EAGLE-2's. Training runs all K steps on the drafter's own states, as EAGLE-3 does (arXiv 2503.01840): at step i the
row of position t sees the context up to t and its own earlier steps. With `loss.depth_decay` close to 0 and
`loss.feature_weight` the first step alone is trained, on the target's states and toward them, as in EAGLE-1, but for
its noise. Ours: the norms, the start at LM(h_t), and taps beside h_t with F = 0 at first, where EAGLE-3 has them in
its place.

Shapes: B sequences, T rows, P selected rows, n paths, i drafted rows of a path, J key-value heads, S rows of a context,
E head size, D hidden size, W = (1 + taps) D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amphista.drafter.base import MAX_SIZE, DrafterConfig, DrafterState, check_range, check_taps
from amphista.drafter.layers import LayerCache, LayerSizes, RMSNorm, RowCache
from amphista.drafter.path_rows import Contexts, MadeRows, step
from amphista.drafter.rounds import Paths, PathsT, SequentialHeads
from amphista.drafter.staged import StagedAdaptation, causally
from amphista.target.spec import SharedWeights, TargetSpec


@dataclass(frozen=True, kw_only=True)
class EagleConfig(DrafterConfig):
    """`num_heads` steps, all with the same weights but for LM heads of their own. `taps`: after which of the target's
    layers the rows of the context read states, too. `intermediate_size` defaults to the target's."""

    num_heads: int = 4
    taps: tuple[int, ...] = ()
    intermediate_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("intermediate_size", self.intermediate_size, 1, MAX_SIZE)


@dataclass(frozen=True)
class EaglePaths(Paths):
    """`outputs` g [n, D]; `owners` [n], ascending, whose context each path goes on from, and how many of its rows it
    sees, `seen` [n]; keys and values [n, J, i, E] of its own rows. contexts: keys, values [J, S, E] of each owner."""

    outputs: Tensor
    owners: Tensor
    seen: Tensor
    keys: Tensor
    values: Tensor
    contexts: Sequence[tuple[Tensor, Tensor]]


class FusedHeads(SequentialHeads[PathsT]):
    """What reads rows u_j, of states fused with tokens, through one layer."""

    config: EagleConfig

    def __init__(self, config: EagleConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        super().__init__(config, spec, shared)
        check_taps(config.taps, spec.num_layers)
        self.taps, size = config.taps, spec.hidden_size
        self.embedding_norm = RMSNorm(spec.embedding_size, spec.norm_eps)
        self.tap_norms = nn.ModuleList(RMSNorm(size, spec.norm_eps) for _ in config.taps)
        self.fuse_taps = nn.Linear(len(config.taps) * size, size, bias=False) if config.taps else None
        if self.fuse_taps is not None:
            nn.init.zeros_(self.fuse_taps.weight)
        self.stage = StagedAdaptation(LayerSizes.of(spec, config.intermediate_size), spec.embedding_size)
        self.output_norm = RMSNorm(spec.hidden_size, spec.norm_eps)

    def match_scale(self, hidden_rms: float) -> None:
        """The LM head expects post-norm states of a certain size: give the output norm the measured rms of h."""
        nn.init.constant_(self.output_norm.weight, hidden_rms)

    def _embedded(self, token_ids: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_norm(self._shared.embed(token_ids).to(self.dtype))
        return embedded

    def fused(self, hidden: Tensor, next_ids: Tensor) -> Tensor:
        """u of rows of the context, hidden states and taps [B, T, W] -> [B, T, D]."""
        states, *taps = hidden.split(self.spec.hidden_size, dim=-1)
        rows = self.stage.fused(states, self._embedded(next_ids))
        if self.fuse_taps is not None:
            normed = [norm(tap) for norm, tap in zip(self.tap_norms, taps, strict=True)]
            rows = rows + self.fuse_taps(torch.cat(normed, dim=-1))
        return rows

    def trim(self, state: DrafterState, num_rows: int) -> None:
        state.num_rows = min(state.num_rows, num_rows)
        for cache in state.caches:
            cache.trim(num_rows)


class Eagle(FusedHeads[EaglePaths]):
    """The full drafter; see the module's equations."""

    name = "eagle"

    def _context(
        self, hidden: Tensor, next_ids: Tensor, positions: Tensor, cache: RowCache, select: Tensor | None = None
    ) -> Tensor:
        """g behind rows of the context [B, T, W] at positions [1, T]; into the cache."""
        return causally(self.stage.layer, self.fused(hidden, next_ids), positions, cache, select)

    def _begun(
        self, outputs: Tensor, owners: Tensor, seen: Tensor, contexts: Sequence[tuple[Tensor, Tensor]]
    ) -> EaglePaths:
        """Paths without rows of their own."""
        none = outputs.new_empty(len(outputs), self.spec.num_key_value_heads, 0, self.spec.head_size)
        return EaglePaths(self.output_norm(outputs), outputs, owners, seen, none, none, contexts)

    def first(self, states: Sequence[DrafterState]) -> EaglePaths:
        contexts = []
        for state in states:
            rows = state.caches[0].storage[:, 0, :, : state.num_rows]
            contexts.append((rows[0], rows[1]))
        seen = torch.tensor([state.num_rows for state in states], device=self.device)
        outputs = torch.stack([state.features for state in states])
        return self._begun(outputs, torch.arange(len(states), device=self.device), seen, contexts)

    def first_along(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> EaglePaths:
        length, made = hidden.shape[1], MadeRows()
        positions = torch.arange(length, device=hidden.device)[None]
        outputs = self._context(hidden, next_ids, positions, made, select)
        contexts = list(zip(made.keys, made.values, strict=True))
        return self._begun(outputs, select // length, select % length + 1, contexts)

    def next(self, paths: EaglePaths, tokens: Tensor) -> EaglePaths:
        rows = self.stage.fused(paths.outputs, self._embedded(tokens))
        before = Contexts(paths.contexts, paths.owners, paths.seen)
        made, keys, values = step(self.stage.layer, rows[:, None], (paths.keys, paths.values), before)
        outputs = made[:, 0]
        return EaglePaths(self.output_norm(outputs), outputs, paths.owners, paths.seen, keys, values, paths.contexts)

    @property
    def row_bytes(self) -> int:
        return 2 * self.spec.num_key_value_heads * self.spec.head_size * self.dtype.itemsize

    def start(self) -> DrafterState:
        return DrafterState(caches=[LayerCache()])

    def feed(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        (cache,) = state.caches
        cache.trim(state.num_rows)  # what a commit that was broken off has left
        positions = torch.arange(state.num_rows, state.num_rows + len(hidden), device=hidden.device)[None]
        rows = self._context(hidden.to(self.dtype)[None], next_ids[None], positions, cache)
        state.features = rows[0, -1]
        state.num_rows += len(hidden)
