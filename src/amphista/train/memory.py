"""Keep freed memory in the process while training: a step frees and asks for the same blocks again and again.

glibc gives blocks above 128 kB (a limit that grows to 32 MB as they are freed) back to the kernel, and trims the top of
the heap; every page that comes back is faulted in and zeroed anew.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_ON_HEAP = 32 << 20  # bytes; glibc accepts no more (HEAP_MAX_SIZE / 2)
# Batches of every length leave gaps in the heap that others do not fit: it grew by 50 MB a step, from 5 GB.
STEPS_TO_TRIM = 20


def keep_freed_memory() -> bool:
    """From now on blocks up to 32 MB stay in this process when freed; returns whether the allocator took it.

    The process holds its peak for `STEPS_TO_TRIM` steps. Anywhere but on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # musl has a mallopt that does nothing
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    never = -1  # as a size_t: the largest there is
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP)) and bool(mallopt(M_TRIM_THRESHOLD, never))
