"""KV storage whose addresses never change, for forwards recorded as graphs: one sequence lives in it at a time.

A `BufferedCache` is an ordinary cache whose tensors are, while it is attached to a `PersistentBuffer`, views into that.
So whatever reads and writes a `KVCache` (prefill, commit, trim, the next chat turn) does the same here, and a cache
that outgrows its buffer has simply left it. Attaching copies rows, and detaches the owner before: its rows are copied
into storage of its own.

Law: a cache that is attached, grows or is detached holds the same rows as one that never did.

Shapes: L layers, J key-value heads, C capacity, E head size, N new rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amphista.cache.static import KVCache, sent


@dataclass(frozen=True)
class ScatteredRows:
    """Keys and values [1, J, C + 1, E] of one layer; new rows go where `slots` [N], a tensor on the device, says."""

    keys: Tensor
    values: Tensor
    slots: Tensor

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows [1, J, N, E]; all rows, used or not: the mask hides what is not there."""
        self.keys.index_copy_(2, self.slots, keys)
        self.values.index_copy_(2, self.slots, values)
        return self.keys, self.values


class PersistentBuffer:
    """Keys and values of all layers: [L, 2, J, C + 1, E]. Row C takes what padding writes and belongs to nobody.

    Zeros at first: a forward multiplies rows that are not there by a weight of 0, which a NaN left in memory would
    survive.
    """

    def __init__(self, layers: tuple[int, int, int], capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        """layers: their number L, key-value heads J and head size E."""
        num_layers, heads, size = layers
        self.capacity = capacity
        self.rows = torch.zeros(num_layers, 2, heads, capacity + 1, size, dtype=dtype, device=device)
        self.views = [(layer[0][None, :, :capacity], layer[1][None, :, :capacity]) for layer in self.rows]
        self._owner: weakref.ref[BufferedCache] | None = None

    def scattered(self, slots: Tensor) -> list[ScatteredRows]:
        """The layers as a recorded forward writes them."""
        return [ScatteredRows(layer[0][None], layer[1][None], slots) for layer in self.rows]

    def holds(self, cache: BufferedCache) -> bool:
        """Whether all rows of this cache are here; a layer that has grown has left."""
        if cache.buffer is not self:
            return False
        return all(layer.keys is keys for layer, (keys, _) in zip(cache.layers, self.views, strict=True))

    def attach(self, cache: BufferedCache) -> None:
        """Let a cache live here, with up to C rows; the owner before is detached."""
        owner = None if self._owner is None else self._owner()
        if owner is not None and owner is not cache and owner.buffer is self:  # it may have moved on by itself
            owner.detach()
        for layer, (keys, values) in zip(cache.layers, self.views, strict=True):
            for mine, here in ((layer.keys, keys), (layer.values, values)):
                if mine is not None and mine is not here:
                    here[:, :, : layer.num_rows].copy_(mine[:, :, : layer.num_rows])
            layer.keys, layer.values = keys, values
        cache.buffer = self
        self._owner = weakref.ref(cache)


class BufferedCache(KVCache):
    """A cache that may live in a persistent buffer."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.buffer: PersistentBuffer | None = None

    @torch.inference_mode()
    def detach(self) -> None:
        """Take the rows along into storage of its own."""
        buffer, self.buffer = self.buffer, None
        if buffer is None:
            return
        for layer, (keys, values) in zip(self.layers, buffer.views, strict=True):
            layer.keys = _own(layer.keys, keys, layer.num_rows)
            layer.values = _own(layer.values, values, layer.num_rows)

    @torch.inference_mode()
    def _move(self, rows: Sequence[int], to: int) -> None:
        """In its buffer, all layers at once: two kernels instead of four a layer."""
        if self.buffer is None or not self.buffer.holds(self):
            super()._move(rows, to)
            return
        every = self.buffer.rows
        every[:, :, :, to : to + len(rows)] = every.index_select(3, sent(rows, every.device))


def _own(rows: Tensor | None, view: Tensor, num_rows: int) -> Tensor | None:
    """What is a view into a buffer, copied; what is not, as it is."""
    return view[:, :, :num_rows].clone() if rows is view else rows
