"""target/pages.py: what is given back is still there; a model converted weight by weight is the converted model."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from amphista.target import lean, pages
from amphista.target import target as targets
from amphista.target.loading import _converted, _is_only_weights, load_target
from amphista.target.pages import free_bytes, give_back, trim_allocator
from amphista.target.target import Target
from benchmarks.lab.memory import resident_bytes
from tests.tiny import tiny_model

NUMBERS = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_pages_of_a_file_are_given_back_and_read_again(tmp_path):
    save_file({"weight": torch.arange(NUMBERS, dtype=torch.float32)}, tmp_path / "weights.safetensors")
    weight = load_file(tmp_path / "weights.safetensors")["weight"]
    total = float(weight.double().sum())
    before = resident_bytes("RssFile")
    give_back(weight)
    assert before - resident_bytes("RssFile") > 3 * NUMBERS  # of 4 bytes each, whole pages only
    assert float(weight.double().sum()) == total == NUMBERS * (NUMBERS - 1) / 2


def test_memory_of_its_own_keeps_what_it_holds():
    numbers = torch.arange(NUMBERS)
    give_back(numbers, torch.empty(0), torch.ones(3), numbers[5:9])
    trim_allocator()
    assert torch.equal(numbers, torch.arange(NUMBERS))


def test_a_container_has_no_more_than_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "CGROUP", tmp_path)
    whole = free_bytes(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("90000000\n")
    (tmp_path / "memory.stat").write_text("anon 50000000\nfile 30000000\nanon_thp 7\nshmem 1000000\n")
    assert free_bytes(torch.device("cpu")) == 39_000_000 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 39_000_000


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "somewhere")
    give_back(torch.ones(NUMBERS))
    trim_allocator()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_target_in_another_type_is_what_transformers_makes_of_it(target_folder, dtype):
    from transformers import AutoModelForCausalLM

    wanted = AutoModelForCausalLM.from_pretrained(target_folder, dtype=getattr(torch, dtype))
    found = load_target(str(target_folder), device="cpu", dtype=dtype, fast=False).model
    assert found.dtype is wanted.dtype is found.config.dtype
    theirs, ours = wanted.state_dict(), found.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype is theirs[name].dtype for name in theirs)
    shared = found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert shared == found.config.tie_word_embeddings


def test_models_of_which_parts_keep_their_type_are_left_to_transformers():
    model = tiny_model()
    assert _is_only_weights(model) and next(_converted(model, torch.bfloat16).parameters()).dtype is torch.bfloat16
    model._keep_in_fp32_modules = {"norm"}
    assert not _is_only_weights(model)
    other = tiny_model()
    other.register_buffer("scale", torch.ones(1))
    assert not _is_only_weights(other)


@pytest.mark.parametrize("native", [True, False])
def test_pages_that_every_step_reads_are_kept(monkeypatch, native):
    """The C step has copies; the torch form reads the stock model's own weights."""
    given = []
    for module in (lean, targets):
        monkeypatch.setattr(module, "give_back", lambda *tensors: given.extend(tensors))
    target = Target(tiny_model())
    assert target.speed_up(release=True, native=native)
    assert bool(given) == native
