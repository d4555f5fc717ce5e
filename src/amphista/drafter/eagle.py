"""A drafter after EAGLE (arXiv 2401.15077, 2406.16858): one layer that goes on from its own states, token by token.

    u_j     = W [n_g(g_j) ; n_E(E(x_{j+1}))],  g_j = h_j                                   rows j <= t, of the context
    g_{t+1} = Layer(u_t at t | u_{<=t})
    g_{t+i} = Layer(W [n_g(g_{t+i-1}) ; n_E(E(x_{t+i}))] at t+i-1 | u_{<=t}, its own path)            drafted, i > 1
    z_i     = LM(n_o(g_{t+i}))                                                             scores x_{t+1+i}

The context is cached as that of a staged adaptation layer is: its keys come from the target's own states. Certain:
the fused state and token, one decoder layer, its output fed back; trees chosen by the drafter's own confidence are
EAGLE-2's. Training runs all K steps on the drafter's own states, as EAGLE-3 does (arXiv 2503.01840): at step i the
row of position t sees the context up to t and its own earlier steps. With `loss.depth_decay` close to 0 and
`loss.feature_weight` the first step alone is trained, on the target's states and toward them, as in EAGLE-1, but for
its noise. Ours: the norms and the start at LM(h_t).

Shapes: B sequences, T rows, P selected rows, n or m paths, i drafted rows of a path, J key-value heads, G query heads
for each, H = J * G, S rows of a context, E head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amphista.drafter.base import MAX_SIZE, DrafterConfig, DrafterState, check_range
from amphista.drafter.layers import LayerCache, LayerSizes, RMSNorm, rotary_tables
from amphista.drafter.rounds import Paths, SequentialHeads
from amphista.drafter.staged import StagedAdaptation
from amphista.target.spec import SharedWeights, TargetSpec


@dataclass(frozen=True, kw_only=True)
class EagleConfig(DrafterConfig):
    """`num_heads` steps, all with the same weights but for LM heads of their own; `intermediate_size` defaults to the
    target's."""

    num_heads: int = 4
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


class Eagle(SequentialHeads[EaglePaths]):
    """The full drafter; see the module's equations."""

    name = "eagle"
    config: EagleConfig

    def __init__(self, config: EagleConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        super().__init__(config, spec, shared)
        self.embedding_norm = RMSNorm(spec.embedding_size, spec.norm_eps)
        self.stage = StagedAdaptation(LayerSizes.of(spec, config.intermediate_size), spec.embedding_size)
        self.output_norm = RMSNorm(spec.hidden_size, spec.norm_eps)

    def match_scale(self, hidden_rms: float) -> None:
        """The LM head expects post-norm states of a certain size: give the output norm the measured rms of h."""
        nn.init.constant_(self.output_norm.weight, hidden_rms)

    def _embedded(self, token_ids: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_norm(self._shared.embed(token_ids).to(self.dtype))
        return embedded

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
        length, made = hidden.shape[1], _Made()
        positions = torch.arange(length, device=hidden.device)[None]
        outputs = self.stage(hidden, self._embedded(next_ids), positions, made, select)
        contexts = list(zip(made.keys, made.values, strict=True))
        return self._begun(outputs, select // length, select % length + 1, contexts)

    def next(self, paths: EaglePaths, tokens: Tensor) -> EaglePaths:
        layer, sizes = self.stage.layer, self.stage.layer.sizes
        x = self.stage.fused(paths.outputs, self._embedded(tokens))
        positions = (paths.seen + paths.keys.shape[2])[:, None]
        rotary = rotary_tables(positions, sizes.head_size, sizes.rope_theta)
        normed = layer.attention_norm(x)[:, None]
        key, value = layer.attention.keys_values(normed, rotary)
        keys, values = (torch.cat([old, new], dim=2) for old, new in ((paths.keys, key), (paths.values, value)))
        mixed = _mix(layer.attention.queries(normed, rotary)[:, :, 0], keys, values, paths)
        outputs = layer.widened(x + layer.attention.output(mixed))
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
        rows = self.stage(hidden.to(self.dtype)[None], self._embedded(next_ids[None]), positions, cache)
        state.features = rows[0, -1]
        state.num_rows += len(hidden)

    def trim(self, state: DrafterState, num_rows: int) -> None:
        state.num_rows = min(state.num_rows, num_rows)
        state.caches[0].trim(num_rows)


class _Made:
    """Keeps what a layer makes of a text [B, J, T, E], with its gradient: a cache that nothing stood in before."""

    num_rows = 0
    keys: Tensor
    values: Tensor

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


def _mix(queries: Tensor, keys: Tensor, values: Tensor, paths: EaglePaths) -> Tensor:
    """Attention of one query [H, E] a path over the rows it sees of its context, and its own [J, i, E]; [n, H * E]."""
    mixed, counts = [], torch.bincount(paths.owners, minlength=len(paths.contexts)).tolist()
    parts = (part.split(counts) for part in (queries, keys, values, paths.seen))
    for query, own_keys, own_values, seen, context in zip(*parts, paths.contexts, strict=True):
        if len(query):
            mixed.append(_mix_of_one(query, own_keys, own_values, seen, context))
    return torch.cat(mixed)


def _mix_of_one(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
    """The same of paths [m] below one context: their queries lie one below the other over its keys."""
    (context_keys, context_values), (number, num_kv_heads, _, size) = context, keys.shape
    grouped = query.view(number, num_kv_heads, -1, size) * size**-0.5  # [m, J, G, E]
    below = grouped.transpose(0, 1).flatten(1, 2)  # [J, m * G, E]
    of_context = (below @ context_keys.transpose(1, 2)).unflatten(1, (number, -1)).transpose(0, 1)  # [m, J, G, S]
    is_hidden = torch.arange(context_keys.shape[1], device=seen.device) >= seen[:, None]
    of_context = of_context.masked_fill(is_hidden[:, None, None], -torch.inf)
    scores = torch.cat([of_context, grouped @ keys.transpose(2, 3)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    over_context, over_own = weights.split([context_keys.shape[1], keys.shape[2]], dim=-1)
    mixed = over_context.transpose(0, 1).flatten(1, 2) @ context_values  # [J, m * G, E]
    together: Tensor = mixed.unflatten(1, (number, -1)).transpose(0, 1) + over_own @ values
    return together.flatten(1)
