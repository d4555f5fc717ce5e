"""Memory: a process of its own tells its peak and what it needed; failures say why."""

from __future__ import annotations

import pytest

from amphista.errors import AmphistaError, ConfigError, NativeError
from amphista.target.target import Target
from benchmarks.lab import memory
from benchmarks.lab.memory import MemoryJob, decodable, peak_memory, resident_bytes
from tests.tiny import tiny_model


def test_a_process_tells_its_peak_and_what_it_held(target_folder):
    model = tiny_model()
    settings = {"device": "cpu"}
    job = MemoryJob(target=str(target_folder), drafter="none", settings=settings, context=200, new_tokens=4)
    measured = peak_memory(job)
    assert measured["weights_bytes"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert measured["drafter_bytes"] == 0 and measured["tokens"] > 200
    spec = Target(model).spec
    row = 2 * spec.num_layers * spec.num_key_value_heads * spec.head_size * 4
    assert measured["cache_bytes"] >= 200 * row
    assert measured["peak_bytes"] > measured["imports_bytes"] > 50e6
    needed = measured["weights_bytes"] + measured["cache_bytes"]
    assert measured["overhead"] == (measured["peak_bytes"] - measured["imports_bytes"]) / needed


def test_what_fails_there_is_told_here(tmp_path):
    with pytest.raises(AmphistaError, match=r"drafter none ended with 1: .*nowhere"):
        peak_memory(MemoryJob(target=str(tmp_path / "nowhere.gguf"), drafter="none", settings={}))
    with pytest.raises(ConfigError, match="context 0"):
        MemoryJob(target="x", drafter="none", settings={}, context=0)
    with pytest.raises(ConfigError, match="has no VmNothing"):
        resident_bytes("VmNothing")


def without_compiler():
    raise NativeError("no compiler")


def test_what_this_machine_cannot_do_is_told_before_or_left_out(monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO", "amphista")
    monkeypatch.setattr(memory, "load", without_compiler)
    assert memory.loadable_types(["float32", "int8"]) == ["float32"]
    assert "int8 is not measured" in caplog.text
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    with pytest.raises(ConfigError, match="which this system does not have"):
        memory.check_peaks_are_told()


def test_drafters_without_weights_for_this_target_are_left_out():
    target = Target(tiny_model(), name="other")
    assert decodable("amphista,medusa,none,mine=/somewhere", target) == ["none", "/somewhere"]
    assert decodable("", target) == ["none"]
    assert decodable("amphista+lookup,lookup", target) == ["none", "lookup"]
