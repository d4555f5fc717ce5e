"""Memory in huge pages (2 MB), where the system gives them on request: a step reads every weight, key and value once,
and with pages of 4 KB looking them up takes half of the time.

Weights are laid side by side in pieces of 64 MB, so that small ones share pages. A piece lives as long as any tensor
in it. What a request took the next one gets: a page that is new is cleared first, which takes longer than all that a
short answer writes into it. So what is used once only, as where a server keeps a request's rows, is in small pages,
which come as they are written; in huge ones from the second time on.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

PIECE_BYTES = 64 << 20
PAGE_BYTES = 2 << 20
LINE_BYTES = 64
HAS_PAGES = hasattr(mmap, "MADV_HUGEPAGE")
MOST_IDLE = 256 << 20  # bytes kept for others
SPARE = 2  # a piece is taken for at least so small a part of it


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


class _Memory(mmap.mmap):
    """Of this process alone."""

    is_huge = False

    @classmethod
    def of(cls, num_bytes: int) -> _Memory:
        """So many bytes, and what lies before the start of a page."""
        return cls(-1, num_bytes + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def in_huge_pages(self) -> _Memory:
        """Itself, what stood in it being lost once."""
        if not self.is_huge:
            self.madvise(mmap.MADV_DONTNEED)
            self.madvise(mmap.MADV_HUGEPAGE)
            self.is_huge = True
        return self

    def part(self, num_bytes: int) -> Tensor:
        """So much of it from the start of a page on; it holds the memory."""
        whole = torch.frombuffer(self, dtype=torch.uint8)
        start = -whole.data_ptr() % PAGE_BYTES
        return whole[start : start + num_bytes]


class Pool:
    """Hands out pieces of memory, and again once no tensor lies in them."""

    def __init__(self) -> None:
        self._pieces: list[_Memory] = []
        self._lock = threading.Lock()

    def empty(self, num_bytes: int) -> Tensor:
        """So many bytes, whatever stands in them, from the start of a page on."""
        with self._lock:
            idle = sorted((len(self._pieces[n]), n) for n in range(len(self._pieces)) if self._is_idle(n))
            wanted = _rounded(num_bytes)
            fitting = [n for size, n in idle if wanted <= size - PAGE_BYTES <= SPARE * wanted]
            dropped: set[int] = set()
            if fitting:
                return self._pieces[fitting[0]].in_huge_pages().part(num_bytes)
            kept = sum(size for size, _ in idle)
            while idle and kept > MOST_IDLE:
                size, n = idle.pop()
                kept -= size
                dropped.add(n)
            self._pieces = [piece for n, piece in enumerate(self._pieces) if n not in dropped]
            self._pieces.append(_Memory.of(wanted))
            return self._pieces[-1].part(num_bytes)

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def idle_bytes(self) -> int:
        """Of the pieces that wait for somebody."""
        return sum(len(self._pieces[n]) for n in range(len(self._pieces)) if self._is_idle(n))

    def _is_idle(self, n: int) -> bool:
        """Whether nobody else holds it, as the storage of a tensor does."""
        return _references(self._pieces, n) == ALONE


def _references(items: Sequence[object], n: int) -> int:
    """How many hold an item, those of the question included, whose number is the interpreter's."""
    return sys.getrefcount(items[n])


ALONE = _references([object()], 0)


def _rounded(num_bytes: int) -> int:
    """So that pieces fit others: one of four sizes between two powers of two."""
    step = 1 << max(0, num_bytes.bit_length() - 3)
    return -(-num_bytes // step) * step


_POOL = Pool()


def empty_like(tensor: Tensor, *shape: int) -> Tensor:
    """Of a tensor's type and device, but of another shape, uninitialized."""
    num_bytes = math.prod(shape) * tensor.element_size()
    if tensor.device.type != "cpu" or num_bytes < PAGE_BYTES or not HAS_PAGES:
        return tensor.new_empty(shape)
    return _POOL.empty(num_bytes).view(tensor.dtype).view(shape)


def _piece(num_bytes: int) -> Tensor:
    if not HAS_PAGES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    return _Memory.of(num_bytes).in_huge_pages().part(num_bytes)
