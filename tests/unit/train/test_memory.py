"""Freed blocks stay: asked of a process of its own, since the allocator's settings hold for a whole process."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import ctypes, resource, sys
from amphista.train.memory import keep_freed_memory
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.memset.argtypes, library.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]

def pages_faulted(size=16 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [library.malloc(size) for _ in range(4)]
        for block in blocks:
            library.memset(block, 1, size)
        for block in blocks:
            library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = pages_faulted()
taken = keep_freed_memory()
pages_faulted()
print(taken, first, pages_faulted())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_blocks_that_come_back_are_not_faulted_in_again():
    said = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True).stdout.split()
    if said[0] == "False":
        pytest.skip("this C library is not glibc")
    before, after = int(said[1]), int(said[2])
    assert before > 10 * 4 * 4096 / 2 and after < 4096, f"faults in 40 times 4096 pages: {before}, then {after}"


def test_elsewhere_nothing_happens(monkeypatch):
    from amphista.train.memory import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
