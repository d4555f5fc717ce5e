"""Functions over fixed buffers, recorded once and replayed: on CUDA as a graph, elsewhere by running them.

A small model's forward is hundreds of kernels of a few microseconds each, and launching them one by one takes longer
than running them. A graph launches all of them at once.

Law of a recorded function: it reads and writes tensors that were there when it was recorded and whose addresses and
shapes stay; it asks the device nothing (no `int(tensor)`, no `.all()` in a condition, nothing sized by values); and run
twice on the same inputs it leaves what one run leaves, because warming up runs it several times.

Source: CUDA graphs as torch.cuda.graph captures them (pytorch.org/docs, "CUDA semantics", section CUDA Graphs).
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amphista.errors import CaptureError, first_line

WARM_UPS = 3  # kernels choose their workspaces and what is made lazily is made before the capture
IDLE_SECONDS = 0.25  # without a replay, after which another thread may have the buffers
MAX_RECORDED = 128  # tree sizes times capacities that a run meets; a graph holds the launch records of its kernels


class Region(Protocol):
    """A function with its buffers."""

    def run(self) -> None:
        """Compute the output buffers from the input buffers."""


R = TypeVar("R", bound=Region)


class Recorder:
    """Records functions for one device. Graphs share their memory: only one of them runs at a time, and nothing that a
    graph makes outside its buffers is read after it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None

    def follow(self) -> None:
        """Let this thread's stream wait for what another one has queued on the same buffers."""
        if self._device.type == "cuda":
            before, self._stream = self._stream, torch.cuda.current_stream(self._device)
            if before is not None and before != self._stream:
                self._stream.wait_stream(before)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What replays `run`; raises CaptureError where the device cannot record it, out of memory included."""
        if self._device.type != "cuda":
            return run
        try:
            return self._capture(run)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; so is every refusal of a capture
            raise CaptureError(first_line(error)) from error

    def _capture(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    run()
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()
        replay: Callable[[], None] = graph.replay
        return replay


class Recorded(Generic[R]):
    """Regions by key, each recorded at its first use; beyond `limit` the one not used for longest is dropped."""

    def __init__(self, recorder: Recorder, limit: int = MAX_RECORDED) -> None:
        self._recorder, self._limit = recorder, limit
        self._kept: OrderedDict[Hashable, tuple[R, Callable[[], None]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], R]) -> tuple[R, Callable[[], None]]:
        """The region of this key and what replays it; made and recorded on inputs of its own where there is none.

        raises CaptureError where the device has no memory for it or cannot record it.
        """
        if key not in self._kept:
            try:
                region = make()
            except torch.OutOfMemoryError as error:
                raise CaptureError(first_line(error)) from error
            self._kept[key] = region, self._recorder.record(region.run)
            if len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def clear(self) -> None:
        """Drop everything recorded."""
        self._kept.clear()


class Inputs:
    """Integers that change from one replay to the next: written on the host, brought to the device in one copy.

    parts: how many integers each of `device` (tensors) and `host` (arrays over pinned memory) has.
    """

    def __init__(self, parts: tuple[int, ...], device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._staged = torch.zeros(sum(parts), dtype=torch.int64, pin_memory=is_cuda)
        self._tensor = torch.zeros(sum(parts), dtype=torch.int64, device=device)
        self._arrived = torch.cuda.Event() if is_cuda else None
        self.device: tuple[Tensor, ...] = self._tensor.split(parts)
        self._host = np.split(self._staged.numpy(), np.cumsum(parts)[:-1])

    def host(self) -> list[NDArray[np.int64]]:
        """The arrays to write, once the device has what was sent before."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host

    def send(self) -> None:
        """Bring them over."""
        self._tensor.copy_(self._staged, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()


class ThreadLease:
    """Which thread may use buffers whose contents outlive a call: one at a time.

    It is theirs until they give it back, end, or neither use the buffers nor what was last shown of them for a while.
    """

    def __init__(self) -> None:
        self._holder: weakref.ref[threading.Thread] | None = None
        self._shown: weakref.ref[object] | None = None
        self._used = 0.0
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Whether the calling thread has the buffers now."""
        with self._lock:
            if not self._is_open():
                return False
            self._holder, self._used = weakref.ref(threading.current_thread()), time.monotonic()
            return True

    def show(self, views: object) -> None:
        """Nobody else is let in while `views`, which show the buffers, are alive."""
        self._shown = weakref.ref(views)

    def give_back(self) -> None:
        """The buffers are anybody's."""
        with self._lock:
            self._holder = None

    def is_open(self) -> bool:
        """Whether the calling thread would get the buffers; takes nothing."""
        with self._lock:
            return self._is_open()

    def _is_open(self) -> bool:
        holder = None if self._holder is None else self._holder()
        if holder is None or not holder.is_alive() or holder is threading.current_thread():
            return True
        is_shown = self._shown is not None and self._shown() is not None
        return not is_shown and time.monotonic() - self._used > IDLE_SECONDS


def bucket(size: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest of the ascending sizes that holds `size`; None if none does."""
    return next((candidate for candidate in sizes if candidate >= size), None)


def capacities(first: int, num_rows: int) -> list[int]:
    """Doubling from `first`, up to the one that holds `num_rows`."""
    found = [first]
    while found[-1] < num_rows:
        found.append(2 * found[-1])
    return found
