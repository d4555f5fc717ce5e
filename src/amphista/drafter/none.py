"""No drafts: the tree is the root alone, so the same engine decodes autoregressively.

This is the baseline of every benchmark and the oracle of every losslessness test: the shipped code, not a copy.
"""

from __future__ import annotations

from torch import Tensor

from amphista.drafter.base import Drafter, DrafterState
from amphista.tree.candidates import Candidates


class NoDrafter(Drafter):
    """Proposes nothing."""

    name = "none"

    @property
    def num_heads(self) -> int:
        return 0

    def commit(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        state.num_rows += hidden.shape[0]

    def draft(
        self, state: DrafterState, num_ranks: int, temperature: float = 0.0, max_depth: int | None = None
    ) -> Candidates:
        return Candidates([], [])

    def trim(self, state: DrafterState, num_rows: int) -> None:
        state.num_rows = min(state.num_rows, num_rows)
