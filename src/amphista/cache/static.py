"""Contiguous KV storage for one sequence: rows are appended, an accepted path is kept, the tail is cut.

Law: after `commit(path)` the cache equals the cache of a plain prefill of the committed tokens. Storage grows
geometrically with the rows really written; it is never sized by the model's maximum.

Shapes: H key-value heads, T new rows, S rows so far, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amphista.errors import CapacityError
from amphista.native.huge_pages import empty_like

FIRST_CAPACITY = 192  # an answer of 128 tokens and the rows of a tree
GROWTH = 1.5


def sent(numbers: Sequence[int], device: torch.device | None) -> Tensor:
    """Integers on a device; on CUDA through pinned memory, which waits for nothing that is queued there."""
    if device is None or device.type != "cuda":
        return torch.tensor(list(numbers), device=device)
    return torch.tensor(list(numbers), pin_memory=True).to(device, non_blocking=True)


def grown(old: Tensor | None, like: Tensor, capacity: int) -> Tensor:
    """New storage [1, H, capacity, E] with what `old` held; the rest is as in `like`."""
    new = like.new_empty(1, like.shape[1], capacity, like.shape[3])
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new


class LayerRows:
    """Keys and values of one layer. Views returned by `append` are valid until the next `append`."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Rows that fit before the next growth."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows [1, H, T, E] behind the last one; return views of all rows [1, H, S + T, E]."""
        start, end = self.num_rows, self.num_rows + keys.shape[2]
        self.make_room(end, keys, values)
        assert self.keys is not None and self.values is not None
        self.keys.narrow(2, start, end - start).copy_(keys)
        self.values.narrow(2, start, end - start).copy_(values)
        self.num_rows = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def make_room(self, num_rows: int, keys: Tensor, values: Tensor) -> None:
        """Let `num_rows` rows like these [1, H, *, E] fit altogether."""
        if num_rows > self.capacity:
            capacity = max(FIRST_CAPACITY, num_rows, int(self.capacity * GROWTH))
            self.keys, self.values = grown(self.keys, keys, capacity), grown(self.values, values, capacity)

    def copied(self, num_rows: int) -> LayerRows:
        """Its first rows, in storage of their own."""
        copy = LayerRows()
        if self.keys is not None and self.values is not None and num_rows:
            copy.append(self.keys[:, :, :num_rows], self.values[:, :, :num_rows])
        copy.num_rows = num_rows
        return copy

    def move(self, source: Tensor, to: int) -> None:
        """Copy the rows `source` (indices [M], ascending) to row `to` and those behind it; none moves backwards."""
        if self.keys is None or self.values is None:  # a layer that reads another's keys and values
            return
        end = to + source.shape[0]
        self.keys[:, :, to:end] = self.keys.index_select(2, source)
        self.values[:, :, to:end] = self.values.index_select(2, source)


class RowsWithTail:
    """A layer's rows, behind which others [H, P, E] stand in all views: they are not counted, so never committed."""

    def __init__(self, rows: LayerRows, keys: Tensor, values: Tensor) -> None:
        self._rows, self._keys, self._values = rows, keys, values

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As that of the rows; the views end with the tail, which the next rows are written over."""
        rows, size = self._rows, self._keys.shape[1]
        rows.make_room(rows.num_rows + keys.shape[2] + size, keys, values)
        rows.append(keys, values)
        assert rows.keys is not None and rows.values is not None
        rows.keys[0].narrow(1, rows.num_rows, size).copy_(self._keys)
        rows.values[0].narrow(1, rows.num_rows, size).copy_(self._values)
        return rows.keys.narrow(2, 0, rows.num_rows + size), rows.values.narrow(2, 0, rows.num_rows + size)


class KVCache:
    """The target's cache for one sequence: committed rows, then the rows of the tree under verification."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerRows() for _ in range(num_layers)]
        self.num_committed = 0
        self.first_capacity = FIRST_CAPACITY  # of one piece; more where it is known that more rows will come
        self._piece: Tensor | None = None
        self._first: Tensor | None = None  # of its views: another in its place is no view of it
        self._numbers: np.ndarray[Any, Any] | None = None  # the piece, where few rows move with few instructions

    @property
    def num_rows(self) -> int:
        """All rows written, those of an uncommitted tree included."""
        return max([layer.num_rows for layer in self.layers], default=0)  # a list: this is asked several times a step

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        tensors = [t for layer in self.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def commit(self, path: Sequence[int]) -> None:
        """Keep the tree rows named by `path` (node indices, ascending) and drop all others."""
        tree_rows = self.num_rows - self.num_committed
        if list(path) != sorted(set(path)) or any(not 0 <= node < tree_rows for node in path):
            raise CapacityError(
                f"cannot commit path {list(path)}: the tree has {tree_rows} rows, ascending and distinct"
            )
        fixed = next((i for i, node in enumerate(path) if node != i), len(path))
        if fixed < len(path):  # rows before `fixed` already lie where they belong
            self._move([self.num_committed + node for node in path[fixed:]], self.num_committed + fixed)
        self.num_committed += len(path)
        for layer in self.layers:
            layer.num_rows = self.num_committed

    def _move(self, rows: Sequence[int], to: int) -> None:
        """Copy these rows, ascending, to row `to` and those behind it; none moves backwards."""
        if self._numbers is not None and self.layers[0].keys is self._first:  # all layers at once
            for place, row in enumerate(rows, start=to):
                self._numbers[:, :, place] = self._numbers[:, :, row]
            return
        device = next((layer.keys.device for layer in self.layers if layer.keys is not None), None)
        source = sent(rows, device)
        with torch.inference_mode():
            for layer in self.layers:
                layer.move(source, to)

    def in_one_piece(self, num_rows: int, row: Tensor) -> Tensor:
        """All layers' keys, then their values, side by side: [2 L, H, capacity, E], with room for `num_rows` rows like
        `row` [1, H, *, E]. The layers' own are views of it until they grow by themselves, which the first does first.
        """
        first = self.layers[0]
        is_whole = self._piece is not None and first.keys is self._first
        if self._piece is None or not is_whole or first.capacity < num_rows:
            grown = first.capacity if first.capacity >= num_rows else int(first.capacity * GROWTH)
            capacity, size = max(self.first_capacity, num_rows, grown), len(self.layers)
            piece = empty_like(row, 2 * size, row.shape[1], capacity, row.shape[3])
            for n, layer in enumerate(self.layers):
                keys, values = piece[n : n + 1], piece[size + n : size + n + 1]
                if layer.keys is not None and layer.values is not None:
                    keys[:, :, : layer.num_rows] = layer.keys[:, :, : layer.num_rows]
                    values[:, :, : layer.num_rows] = layer.values[:, :, : layer.num_rows]
                layer.keys, layer.values = keys, values
            self._piece, self._first = piece, first.keys
            self._numbers = piece.view(torch.uint8).numpy()
        return self._piece

    def trim(self, num_rows: int) -> None:
        """Keep the first `num_rows` committed rows; also drops the rows of an uncommitted tree."""
        if not 0 <= num_rows <= self.num_committed:
            raise CapacityError(f"cannot trim to {num_rows} rows: {self.num_committed} are committed")
        for layer in self.layers:
            layer.num_rows = num_rows
        self.num_committed = num_rows

    @torch.inference_mode()
    def take_copy(self, other: KVCache, num_rows: int) -> None:
        """Hold, in place of what it holds, the first committed rows of another cache."""
        self.layers = [layer.copied(num_rows) for layer in other.layers]
        self.num_committed = num_rows

    def check_integrity(self) -> None:
        """Every layer that writes rows holds the same number, and the committed ones are among them."""
        counts = {layer.num_rows for layer in self.layers if layer.keys is not None} or {0}
        if len(counts) != 1 or self.num_committed > self.num_rows:
            raise CapacityError(f"cache layers disagree: {sorted(counts)} rows, {self.num_committed} committed")
