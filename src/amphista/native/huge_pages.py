"""Memory in huge pages (2 MB), where the system gives them on request: a step reads every weight, key and value once,
and with pages of 4 KB looking them up takes half of the time.

Weights are laid side by side in pieces of 64 MB, so that small ones share pages. A piece lives as long as any tensor
in it.
"""

from __future__ import annotations

import math
import mmap
import threading

import torch
from torch import Tensor

PIECE_BYTES = 64 << 20
PAGE_BYTES = 2 << 20
LINE_BYTES = 64


class Arena:
    """Hands out memory piece by piece; nothing is taken back but with the tensors themselves."""

    def __init__(self) -> None:
        self._piece, self._used = torch.empty(0, dtype=torch.uint8), 0
        self._lock = threading.Lock()

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor."""
        place = self.empty(tensor.numel() * tensor.element_size())
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())

    def empty(self, num_bytes: int) -> Tensor:
        """So many bytes."""
        with self._lock:
            if self._used + num_bytes > self._piece.numel():
                self._piece, self._used = _piece(max(num_bytes, PIECE_BYTES)), 0
            place = self._piece[self._used : self._used + num_bytes]
            self._used += -(-num_bytes // LINE_BYTES) * LINE_BYTES
        return place


def empty_like(tensor: Tensor, *shape: int) -> Tensor:
    """Of a tensor's type and device, but of another shape, uninitialized."""
    num_bytes = math.prod(shape) * tensor.element_size()
    if tensor.device.type != "cpu" or num_bytes < PAGE_BYTES:
        return tensor.new_empty(shape)
    return _piece(num_bytes).view(tensor.dtype).view(shape)


def _piece(num_bytes: int) -> Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE_BYTES
    return whole[start : start + num_bytes]
