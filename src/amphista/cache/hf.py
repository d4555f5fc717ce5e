"""The adapter that lets an unmodified `transformers` model read and write our cache.

`transformers` 5.10 calls the length limit `get_max_cache_shape`, 5.23 `get_max_length`: both exist here. `crop` changed
its meaning between the two (rows kept, rows removed), so nothing here or elsewhere calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from amphista.cache.slots import SlotWriter
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


class HFSlotLayer(CacheLayerMixin):
    """One layer of a ragged batch behind the same interface."""

    is_sliding = False

    def __init__(self, writer: SlotWriter) -> None:
        super().__init__()
        self._writer = writer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage is there before a batched forward."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._writer.append(key_states, value_states)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self._writer.num_rows, 0

    def get_seq_length(self) -> int:
        return self._writer.num_rows - 1

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


def as_transformers_slots(writers: Sequence[SlotWriter]) -> Cache:
    """A `transformers` cache that writes one row a slot."""
    return Cache(layers=[HFSlotLayer(writer) for writer in writers])
