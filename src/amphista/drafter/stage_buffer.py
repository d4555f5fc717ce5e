"""Keys and values of the staged adaptation layers at fixed addresses, for feeding that is recorded as a graph.

What `cache/persistent.py` is for the target: one sequence's rows live here at a time, its caches being views meanwhile,
so that a drafter reads and writes them the same way wherever they are.

Shapes: S stages, T new rows, J key-value heads, C capacity, E head size.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from amphista.drafter.amphista import Amphista
from amphista.drafter.base import DrafterState


class StageRows:
    """One stage's rows [2, 1, J, C + 1, E] as its layer sees a cache; new ones go to `slots` [T], on the device.

    Row j stands at position j, and a stage lets a row see all rows up to its own position: so what lies behind the end,
    and row C, which is nobody's, are hidden already.
    """

    def __init__(self, rows: Tensor, slots: Tensor) -> None:
        self.rows, self.slots = rows, slots
        self.num_rows = rows.shape[3] - len(slots)  # as if the new rows were the last of all C + 1

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows [1, J, T, E]; all rows."""
        self.rows[0].index_copy_(2, self.slots, keys)
        self.rows[1].index_copy_(2, self.slots, values)
        return self.rows[0], self.rows[1]


class StageBuffer:
    """The rows of all stages: [S, 2, 1, J, C + 1, E], zeros at first (a NaN would survive a weight of 0)."""

    def __init__(self, heads: Amphista, capacity: int) -> None:
        spec, self.capacity = heads.spec, capacity
        shape = (len(heads.stages), 2, 1, spec.num_key_value_heads, capacity + 1, spec.head_size)
        self.rows = torch.zeros(shape, dtype=heads.dtype, device=heads.device)
        self.views = [rows[..., :capacity, :] for rows in self.rows]
        self._owner: weakref.ref[DrafterState] | None = None

    def holds(self, state: DrafterState) -> bool:
        """Whether this state's rows are here; a stage that has grown has left."""
        return all(cache.storage is view for cache, view in zip(state.caches, self.views, strict=True))

    def attach(self, state: DrafterState) -> None:
        """Let a state's rows live here; the owner before is detached."""
        owner = None if self._owner is None else self._owner()
        if owner is not None and owner is not state:
            self.detach(owner)
        for cache, view in zip(state.caches, self.views, strict=True):
            if cache.storage is not view:
                cache.move_to(view)
        self._owner = weakref.ref(state)

    def detach(self, state: DrafterState) -> None:
        """Let a state take its rows along into storage of its own."""
        for cache, view in zip(state.caches, self.views, strict=True):
            if cache.storage is view:
                cache.move_to(torch.empty_like(view[..., : max(1, cache.num_rows), :]))
