"""The adapter that lets an unmodified `transformers` model read and write our caches.

`transformers` 5.10 calls the length limit `get_max_cache_shape`, 5.23 `get_max_length`: both exist here. `crop` changed
its meaning between the two (rows kept, rows removed), so nothing here or elsewhere calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Rows(Protocol):
    """What new keys and values of a layer are written to, of one sequence."""

    @property
    def num_rows(self) -> int: ...

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


class HFLayer(CacheLayerMixin):
    """One layer of our caches behind the `transformers` interface: new rows of several sequences come side by side and
    go each to its own; all rows of all come back side by side, and the mask tells them apart. Sliding layers keep all
    rows; the mask cuts the window."""

    is_sliding = False

    def __init__(self, rows: Sequence[Rows], sizes: Sequence[int]) -> None:
        super().__init__()
        self._rows, self._sizes = rows, list(sizes)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage is allocated by the first `update`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if len(self._rows) == 1:
            return self._rows[0].append(key_states, value_states)
        parts = zip(self._rows, key_states.split(self._sizes, 2), value_states.split(self._sizes, 2), strict=True)
        keys, values = zip(*(rows.append(*new) for rows, *new in parts), strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + length, 0

    def get_seq_length(self) -> int:
        return sum(rows.num_rows for rows in self._rows)

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


def as_transformers_cache(caches: Sequence[Sequence[Rows]], sizes: Sequence[int]) -> Cache:
    """A `transformers` cache that writes so many new rows into each of ours, given by their layers."""
    return Cache(layers=[HFLayer(rows, sizes) for rows in zip(*caches, strict=True)])
