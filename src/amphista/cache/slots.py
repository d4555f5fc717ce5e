"""KV storage of a ragged batch: one slot a sequence, its rows left-aligned, so that a row's index is its position.

All slots of a layer lie in one tensor [slots, H, capacity, E], and each slot is a `KVCache` whose tensors are views
into it: a slot is prefilled, trimmed and committed like the cache of a sequence alone, and a batched forward reads the
first B slots as one tensor without copying a row. Slots that decode are kept dense at the front (`move`).

A batched forward reads all rows there is room for, and the room follows the longest sequence in steps of ROOM_STEP: so
what it reads lies in one piece, in a shape that stays the same for many forwards. Some products copy what has gaps and
are planned anew for every shape; together that costs several times the few rows read in vain.

Shapes: B slots that decode, H key-value heads, S rows there is room for, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amphista.cache.static import KVCache, LayerRows, grown

ROOM_STEP = 64
SPARE_STEPS = 3  # so much more room than needed is given back


class SlotRows(LayerRows):
    """One slot in one layer: growing it grows the layer."""

    def __init__(self, layer: SlotLayer) -> None:
        super().__init__()
        self._layer = layer

    def reserve(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        self._layer.reserve(keys, values, capacity)

    def next_capacity(self, num_rows: int) -> int:
        """Never less than now: other slots may need it."""
        return max(self.capacity, -(-num_rows // ROOM_STEP) * ROOM_STEP)


class SlotLayer:
    """Keys and values of one layer, all slots together."""

    def __init__(self, num_slots: int) -> None:
        self.slots = [SlotRows(self) for _ in range(num_slots)]
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def reserve(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        """Have room for `capacity` rows like these [*, H, *, E] in every slot; earlier views go stale."""
        self.keys = grown(self.keys, keys, len(self.slots), capacity)
        self.values = grown(self.values, values, len(self.slots), capacity)
        for index, rows in enumerate(self.slots):
            rows.keys, rows.values = self.keys[index : index + 1], self.values[index : index + 1]

    def write(self, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Put one row [B, H, 1, E] into each of the first B slots, at `positions` [B]; `slots` is 0..B-1.

        No slot counts its new row before `SlotCache.advance`: a forward that breaks off leaves nothing behind.
        """
        assert self.keys is not None and self.values is not None
        self.keys[slots, :, positions] = keys[:, :, 0]
        self.values[slots, :, positions] = values[:, :, 0]


class SlotWriter:
    """One layer in one forward of a ragged batch: one new row for each of the first B slots, at its own position."""

    def __init__(self, layer: SlotLayer, slots: Tensor, positions: Tensor) -> None:
        self._layer, self._slots, self._positions = layer, slots, positions

    @property
    def num_rows(self) -> int:
        """Rows read of each slot: its own, then what the mask must hide."""
        return self._layer.slots[0].capacity

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows [B, H, 1, E]; returns views of all rows [B, H, S, E] of these slots."""
        layer, num_slots = self._layer, len(self._slots)
        layer.write(keys, values, self._slots, self._positions)
        assert layer.keys is not None and layer.values is not None
        return layer.keys[:num_slots], layer.values[:num_slots]


class Slot(KVCache):
    """One sequence's cache, whose storage is shared with the other slots."""

    def __init__(self, layers: list[LayerRows]) -> None:
        super().__init__(0)
        self.layers = layers


class SlotCache:
    """The caches of up to `num_slots` sequences that decode together."""

    def __init__(self, num_layers: int, num_slots: int) -> None:
        self.layers = [SlotLayer(num_slots) for _ in range(num_layers)]
        self.slots = [Slot([layer.slots[index] for layer in self.layers]) for index in range(num_slots)]

    def lengths(self, num_active: int) -> list[int]:
        """Committed rows of each of the first `num_active` slots: the position of its next token."""
        return [slot.num_committed for slot in self.slots[:num_active]]

    @property
    def capacity(self) -> int:
        """Rows there is room for in every slot: what a batched forward reads."""
        return max(layer.slots[0].capacity for layer in self.layers)

    @torch.inference_mode()
    def make_room(self, num_active: int) -> None:
        """Let one more row fit into each of the first `num_active` slots, all of which have been prefilled; give room
        back that long sequences have left."""
        held = max(1 + max(self.lengths(num_active)), *self.lengths(len(self.slots)))
        needed = -(-held // ROOM_STEP) * ROOM_STEP
        if needed <= self.capacity < needed + SPARE_STEPS * ROOM_STEP:
            return
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.reserve(layer.keys, layer.values, needed)

    def writers(self, positions: Tensor) -> list[SlotWriter]:
        """What a forward writes one row a slot with, at `positions` [B]."""
        slots = torch.arange(len(positions), device=positions.device)
        return [SlotWriter(layer, slots, positions) for layer in self.layers]

    def advance(self, num_active: int) -> None:
        """Commit the row just written to each of the first `num_active` slots."""
        for slot in self.slots[:num_active]:
            for rows in slot.layers:
                rows.num_rows += 1
            slot.num_committed += 1

    @torch.inference_mode()
    def move(self, source: int, to: int) -> None:
        """Let slot `to` hold what slot `source` holds; `source` is empty afterwards."""
        held = self.slots[source].num_committed
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys[to, :, :held] = layer.keys[source, :, :held]
                layer.values[to, :, :held] = layer.values[source, :, :held]
            layer.slots[to].num_rows, layer.slots[source].num_rows = held, 0
        self.slots[to].num_committed, self.slots[source].num_committed = held, 0

    def check_integrity(self) -> None:
        """Raise CapacityError when the layers of any slot disagree."""
        for slot in self.slots:
            slot.check_integrity()
