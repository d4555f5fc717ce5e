"""What is recorded is kept by key, the latest used of it; inputs arrive whole; buffers serve one thread."""

from __future__ import annotations

import inspect
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from amphista.errors import CaptureError
from amphista.kernels import graph
from amphista.kernels.graph import WARM_UPS, Inputs, Recorded, Recorder, ThreadLease, bucket, capacities

CPU = torch.device("cpu")


class Counting:
    def __init__(self):
        self.runs = 0

    def run(self):
        self.runs += 1


def test_off_cuda_a_recording_is_the_function_itself():
    region = Counting()
    replay = Recorder(CPU).record(region.run)
    assert region.runs == 0, "nothing to warm up"
    replay(), replay()
    assert region.runs == 2


def test_what_was_used_last_is_kept():
    kept = Recorded(Recorder(CPU), limit=2)
    first = kept.get("a", Counting)[0]
    second = kept.get("b", Counting)[0]
    assert kept.get("a", Counting)[0] is first
    kept.get("c", Counting)
    assert len(kept) == 2 and kept.get("a", Counting)[0] is first
    assert kept.get("b", Counting)[0] is not second
    kept.clear()
    assert len(kept) == 0


def test_what_cannot_be_recorded_is_not_kept(monkeypatch):
    kept = Recorded(Recorder(CPU))

    def refuse(recorder, run):
        raise CaptureError("no")

    with monkeypatch.context() as patch, pytest.raises(CaptureError):
        patch.setattr(Recorder, "record", refuse)
        kept.get("a", Counting)
    assert len(kept) == 0


def test_no_memory_for_the_buffers_is_told_as_one_that_cannot_be_recorded():
    def make():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    kept = Recorded(Recorder(CPU))
    with pytest.raises(CaptureError, match="CUDA out of memory"):
        kept.get("a", make)
    assert len(kept) == 0


def test_every_refusal_of_cuda_is_told_as_one_kind(monkeypatch):
    """Out of memory is a RuntimeError there, like whatever a capture refuses."""
    recorder = Recorder(torch.device("cuda"))
    for error in (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), RuntimeError("not permitted")):

        def fail(recorder, run, error=error):
            raise error

        monkeypatch.setattr(Recorder, "_capture", fail)
        with pytest.raises(CaptureError, match=str(error).splitlines()[0]):
            recorder.record(lambda: None)


def test_inputs_arrive_in_their_parts():
    inputs = Inputs((2, 1, 3), CPU)
    addresses = [part.data_ptr() for part in inputs.device]
    for start in (1, 7):
        first, second, third = inputs.host()
        first[:], second[0], third[:] = [start, start + 1], start + 2, np.arange(3) - start
        inputs.send()
        assert [part.tolist() for part in inputs.device] == [
            [start, start + 1],
            [start + 2],
            [-start, 1 - start, 2 - start],
        ]
    assert addresses == [part.data_ptr() for part in inputs.device]


def test_sizes():
    assert [bucket(size, (1, 2, 4)) for size in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, None]
    assert capacities(16, 1) == [16] and capacities(16, 17) == [16, 32] and capacities(16, 64) == [16, 32, 64]


def test_one_thread_has_it_until_it_ends_gives_it_back_or_rests(monkeypatch):
    lease, answers = ThreadLease(), []

    def elsewhere(ask):
        thread = threading.Thread(target=lambda: answers.append(ask()))
        thread.start(), thread.join()
        return answers.pop()

    assert elsewhere(lease.take) and lease.is_open() and lease.take(), "the thread that had it has ended"
    assert not elsewhere(lease.take) and not elsewhere(lease.is_open) and lease.take()
    lease.give_back()
    assert elsewhere(lease.is_open) and elsewhere(lease.take)
    assert lease.take()
    monkeypatch.setattr(graph, "IDLE_SECONDS", 0.0)
    views = Counting()
    lease.show(views)
    time.sleep(0.001)
    assert not elsewhere(lease.take), "somebody still reads what it showed"
    del views
    assert elsewhere(lease.take)


def test_another_stream_waits_for_the_one_before(monkeypatch):
    """Only the names are real here."""

    class Stream:
        def __init__(self):
            self.waited = []

        def wait_stream(self, other):
            self.waited.append(other)

    first, second = Stream(), Stream()
    recorder = Recorder(torch.device("cuda"))
    for stream in (first, first, second, first):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        recorder.follow()
    assert first.waited == [second] and second.waited == [first]


def test_how_cuda_is_asked(monkeypatch):
    """Warmed up aside, captured once, in memory that all recordings share; only the names are real here."""
    assert {"pool", "capture_error_mode"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
    calls = []

    class Stream:
        def wait_stream(self, other):
            calls.append("waits")

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextmanager
    def entered(name, *args, **settings):
        calls.append((name, *settings.values()))
        yield
        calls.append(f"end of {name}")

    here = Stream()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered("device"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered("aside"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **settings: entered("capture", **settings))
    replay = Recorder(torch.device("cuda")).record(lambda: calls.append("run"))
    expected = [("device",), "waits", ("aside",), *["run"] * WARM_UPS, "end of aside", "waits"]
    expected += [("capture", "pool", "thread_local"), "run", "end of capture", "end of device"]
    assert calls == expected
    replay()
    assert calls[-1] == "replay"
