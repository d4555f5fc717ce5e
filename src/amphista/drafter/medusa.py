"""Medusa-1 heads, the baseline (arXiv 2401.10774, section 2.1.1): z_k = LM_k(h_t + SiLU(A_k h_t + b_k)).

K heads, no interaction between them, no context beyond h_t. `lm_head="own"` is the published form; `"shared"` reads
the target's own head, which is what ships for small targets. Unlike the published code, `num_layers` stacks distinct
blocks. The pending token is not an input: `next_ids` is ignored, but by a path correction (ours) of the first head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amphista.drafter.base import MAX_LAYERS, DrafterState, check_range
from amphista.drafter.heads import ParallelConfig, ParallelHeads
from amphista.drafter.layers import LayerSizes, ResidualBlock
from amphista.drafter.native_drafter import Modules
from amphista.drafter.scoring import StateOf
from amphista.target.spec import SharedWeights, TargetSpec


@dataclass(frozen=True, kw_only=True)
class MedusaConfig(ParallelConfig):
    """`num_layers` residual blocks per head."""

    num_layers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("num_layers", self.num_layers, 1, MAX_LAYERS)


class Medusa(ParallelHeads):
    """Independent residual heads over h_t."""

    name = "medusa"
    config: MedusaConfig

    def __init__(self, config: MedusaConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        super().__init__(config, spec, shared)
        self.heads = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(spec.hidden_size) for _ in range(config.num_layers)))
            for _ in range(config.num_heads)
        )

    def match_scale(self, hidden_rms: float) -> None:
        """Nothing to do: zero-started residual heads already give LM(h_t)."""

    def features(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> list[Tensor]:
        return [hidden.flatten(0, 1).index_select(0, select), next_ids.flatten().index_select(0, select)]

    def head_states(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> Tensor:
        return self._heads(*self.features(hidden, next_ids, select))

    def states_one_by_one(self, features: list[Tensor]) -> StateOf:
        hidden, pending = features

        def state(head: int, rows: Tensor) -> Tensor:
            states: Tensor = self.heads[head](hidden.index_select(0, rows))
            if head or self.path is None:
                return states
            return states + self.correction(states, pending.index_select(0, rows))

        return state

    def _heads(self, hidden: Tensor, pending: Tensor) -> Tensor:
        return self.given_pending(torch.stack([head(hidden) for head in self.heads], dim=-2), pending)

    def parts(self) -> Modules:
        blocks = [list(head.children()) for head in self.heads]
        return Modules(sizes=LayerSizes.of(self.spec), blocks=blocks, reads_pending=self.path is not None)

    def feed(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        state.features, state.pending = hidden[-1].to(self.dtype), next_ids[-1]
        state.num_rows += hidden.shape[0]

    @torch.inference_mode()
    def draft_states(self, states: Sequence[DrafterState]) -> Tensor:
        hidden = torch.stack([state.features for state in states])
        pending = torch.stack([state.pending for state in states if state.pending is not None])
        return self._heads(hidden, pending)

    def trim(self, state: DrafterState, num_rows: int) -> None:
        state.num_rows = min(state.num_rows, num_rows)
