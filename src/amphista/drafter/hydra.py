"""Hydra (arXiv 2402.05109): heads that read the tokens drafted above them, beside one state of the context.

    c_k = [b_t ; E(x_{t+1}) .. E(x_{t+k})],     o_k = W_k c_k + SiLU(A_k c_k),  then residual blocks
    z_k = LM_k(o_k)

b_t is the target's h_t (`base = "hidden"`, Hydra), or a causal layer's over it (`"prefix"`, the main part of Hydra++).
Both are certain, read in the published code, as are LM heads of their own (`lm_head = "own"`, with a bias:
`head_bias`). Ours: `base = "staged"`, a causal layer that reads the tokens, too (Amphista's first stage), with norms on
what it gives; the start at LM(b_t), W_k = [I 0 ..] and A_k = 0; the shared LM head; a draft vocabulary. Without here:
dropout and noise on the inputs, which Hydra++ was trained with.

Shapes: B sequences, T rows, P selected rows, n paths, K heads, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amphista.drafter.base import MAX_LAYERS, MAX_SIZE, DrafterConfig, DrafterState, check_range
from amphista.drafter.layers import LayerCache, LayerSizes, ResidualBlock, RMSNorm, RowCache, TransformerLayer
from amphista.drafter.rounds import Paths, SequentialHeads
from amphista.drafter.staged import StagedAdaptation, causally
from amphista.errors import ConfigError
from amphista.target.spec import SharedWeights, TargetSpec

BASES = ("hidden", "prefix", "staged")


@dataclass(frozen=True, kw_only=True)
class HydraConfig(DrafterConfig):
    """`num_layers` blocks a head, the first of which reads the tokens. `intermediate_size`, of the layer under `prefix`
    and `staged`, defaults to the target's. `head_bias`: own LM heads have a bias even where the target's has none."""

    num_heads: int = 4
    base: Literal["hidden", "prefix", "staged"] = "staged"
    num_layers: int = 1
    intermediate_size: int | None = None
    head_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base not in BASES:
            raise ConfigError(f"base is {self.base!r}: expected one of {', '.join(BASES)}")
        check_range("num_layers", self.num_layers, 1, MAX_LAYERS)
        check_range("intermediate_size", self.intermediate_size, 1, MAX_SIZE)
        if self.head_bias and self.lm_head != "own":
            raise ConfigError("head_bias is for heads with LM heads of their own: set lm_head = 'own'")


class PrefixLayer(nn.Module):
    """A causal layer over the target's states and a norm behind it, as one layer of a Llama model stands alone."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.layer = TransformerLayer(sizes)
        self.norm = RMSNorm(sizes.hidden_size, sizes.norm_eps)

    def forward(
        self, x: Tensor, positions: Tensor, cache: RowCache | None = None, select: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D] at positions [1, T] -> [B, T, D], or of the flat rows `select` [P] alone [P, D]."""
        normed: Tensor = self.norm(causally(self.layer, x, positions, cache, select))
        return normed


class ConditionedBlock(nn.Module):
    """W c + SiLU(A c), from a state and the embeddings of k tokens to a state; starts as the state."""

    def __init__(self, hidden_size: int, inputs_size: int) -> None:
        super().__init__()
        self.residual = nn.Linear(hidden_size + inputs_size, hidden_size)
        self.linear = nn.Linear(hidden_size + inputs_size, hidden_size)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            self.residual.weight[:, :hidden_size].copy_(torch.eye(hidden_size))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.residual(inputs) + F.silu(self.linear(inputs))
        return output


@dataclass(frozen=True)
class HydraPaths(Paths):
    """`base` [n, D] and what was read of the path's tokens, the pending one's first [n, k * embedding size]."""

    base: Tensor
    read: Tensor


class Hydra(SequentialHeads[HydraPaths]):
    """The full drafter; see the module's equations."""

    name = "hydra"
    config: HydraConfig

    def __init__(self, config: HydraConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        super().__init__(config, spec, shared)
        if config.lm_head == "own" and config.head_bias and self.own_bias is None:
            self.own_bias = nn.Parameter(torch.zeros(config.num_heads, self.draft_vocab))
        size, sizes = spec.hidden_size, LayerSizes.of(spec, config.intermediate_size)
        self.prefix = PrefixLayer(sizes) if config.base == "prefix" else None
        is_staged = config.base == "staged"
        self.stage = StagedAdaptation(sizes, spec.embedding_size) if is_staged else None
        self.embedding_norm = RMSNorm(spec.embedding_size, spec.norm_eps) if is_staged else None
        self.output_norm = RMSNorm(size, spec.norm_eps) if is_staged else None
        self.heads = nn.ModuleList(
            nn.Sequential(
                ConditionedBlock(size, (k + 1) * spec.embedding_size),
                *(ResidualBlock(size) for _ in range(config.num_layers - 1)),
            )
            for k in range(config.num_heads)
        )

    def match_scale(self, hidden_rms: float) -> None:
        """The LM head expects post-norm states of a certain size: what norms the states last has the measured rms."""
        last = self.output_norm if self.prefix is None else self.prefix.norm
        if last is not None:
            nn.init.constant_(last.weight, hidden_rms)

    def _read(self, token_ids: Tensor) -> Tensor:
        """What heads read of tokens [...] -> [..., embedding size]."""
        embedded = self._shared.embed(token_ids).to(self.dtype)
        return embedded if self.embedding_norm is None else self.embedding_norm(embedded)

    def _base(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        positions: Tensor,
        cache: RowCache | None = None,
        select: Tensor | None = None,
    ) -> Tensor:
        """b of the rows of hidden [B, T, D] at positions [1, T] -> [B, T, D], or of the flat rows `select` alone."""
        if self.stage is not None:
            staged: Tensor = self.stage(hidden, self._read(next_ids), positions, cache, select)
            return staged
        if self.prefix is not None:
            prefixed: Tensor = self.prefix(hidden, positions, cache, select)
            return prefixed
        return hidden if select is None else hidden.flatten(0, 1).index_select(0, select)

    def _paths(self, base: Tensor, read: Tensor) -> HydraPaths:
        """Where paths stand that have read k tokens: at the state of head k."""
        head = read.shape[-1] // self.spec.embedding_size - 1
        states: Tensor = self.heads[head](torch.cat([base, read], dim=-1))
        return HydraPaths(states if self.output_norm is None else self.output_norm(states), base, read)

    def first(self, states: Sequence[DrafterState]) -> HydraPaths:
        pending = torch.stack([state.pending for state in states if state.pending is not None])
        return self._paths(torch.stack([state.features for state in states]), self._read(pending))

    def first_along(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> HydraPaths:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        base = self._base(hidden, next_ids, positions, None, select)
        return self._paths(base, self._read(next_ids.flatten().index_select(0, select)))

    def next(self, paths: HydraPaths, tokens: Tensor) -> HydraPaths:
        return self._paths(paths.base, torch.cat([paths.read, self._read(tokens)], dim=-1))

    @property
    def row_bytes(self) -> int:
        num_caches = int(self.config.base != "hidden")
        return 2 * num_caches * self.spec.num_key_value_heads * self.spec.head_size * self.dtype.itemsize

    def start(self) -> DrafterState:
        return DrafterState(caches=[LayerCache()] if self.config.base != "hidden" else [])

    def feed(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        for cache in state.caches:
            cache.trim(state.num_rows)  # what a commit that was broken off has left
        positions = torch.arange(state.num_rows, state.num_rows + len(hidden), device=hidden.device)[None]
        cache = state.caches[0] if state.caches else None
        state.features = self._base(hidden.to(self.dtype)[None], next_ids[None], positions, cache)[0, -1]
        state.pending = next_ids[-1]
        state.num_rows += len(hidden)

    def trim(self, state: DrafterState, num_rows: int) -> None:
        state.num_rows = min(state.num_rows, num_rows)
        for cache in state.caches:
            cache.trim(num_rows)
