"""Memory that is held but not needed: pages of weights that were copied elsewhere, and what the allocator keeps.

Weights read from a file are its mapped pages, resident once they were touched. Where a copy has taken their place (in
another type, or in huge pages) they would stay resident beside it until the whole file is closed. Giving them back
changes nothing: whoever reads them again gets them from the file again. On other systems than Linux nothing is done.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CGROUP = Path("/sys/fs/cgroup")
MADV_PAGEOUT = 21  # Linux 5.4: take the pages away, whatever is needed of them is read back


def _c_library() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def give_back(*tensors: Tensor) -> None:
    """Let go of the resident pages of these tensors; what they hold stays as it is."""
    library = _c_library()
    if library is None:
        return
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of its own only
            end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)


def trim_allocator() -> None:
    """Return freed memory to the system: the C library keeps what was freed in pieces."""
    library = _c_library()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def free_bytes(place: torch.device) -> int:
    """Memory that can still be allocated on a device."""
    if place.type == "cuda":
        free, _ = torch.cuda.mem_get_info(place)
        return int(free)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # what the kernel could free counts as free
            free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(free, _left_to_container()))


def _left_to_container() -> float:
    """Of the memory that a container may have (cgroup v2), what is not taken by programs: files can be read again."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no container, or "max"
        return math.inf
    return max(0, limit - sum(int(line.split()[1]) for line in lines if line.startswith(("anon ", "shmem "))))
