"""The adapter that lets an unmodified `transformers` model read and write our cache.

`transformers` 5.10 calls the length limit `get_max_cache_shape`, 5.23 `get_max_length`: both exist here. `crop` changed
its meaning between the two (rows kept, rows removed), so nothing here or elsewhere calls it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from amphista.cache.slots import SlotCache, SlotLayer
from amphista.cache.static import KVCache, LayerRows


class HFLayer(CacheLayerMixin):
    """One layer of ours behind the `transformers` interface. Sliding layers keep all rows; the mask cuts the window."""

    is_sliding = False

    def __init__(self, rows: LayerRows) -> None:
        super().__init__()
        self.rows = rows
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage is allocated by the first `update`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.rows.append(key_states, value_states)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.rows.num_rows + length, 0

    def get_seq_length(self) -> int:
        return self.rows.num_rows

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


def as_transformers_cache(cache: KVCache) -> Cache:
    """A `transformers` cache whose layers write into ours."""
    return Cache(layers=[HFLayer(rows) for rows in cache.layers])


class HFSlotLayer(HFLayer):
    """One layer of a ragged batch: one new row for each of the first B slots, at its own position."""

    def __init__(self, layer: SlotLayer, slots: Tensor, positions: Tensor, num_rows: int) -> None:
        super().__init__(layer.slots[0])
        self._layer, self._slots, self._positions, self._num_rows = layer, slots, positions, num_rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        layer, num_slots = self._layer, len(self._slots)
        layer.write(key_states, value_states, self._slots, self._positions)
        assert layer.keys is not None and layer.values is not None
        return layer.keys[:num_slots, :, : self._num_rows], layer.values[:num_slots, :, : self._num_rows]

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self._num_rows, 0

    def get_seq_length(self) -> int:
        return self._num_rows - 1


def as_transformers_slots(cache: SlotCache, positions: Tensor, num_rows: int) -> Cache:
    """A `transformers` cache that writes one row a slot at `positions` [B]; `num_rows` counts the longest with it."""
    slots = torch.arange(len(positions), device=positions.device)
    return Cache(layers=[HFSlotLayer(layer, slots, positions, num_rows) for layer in cache.layers])
