"""Random-weight targets: sizes as published, told before they are built, refused where they do not fit."""

from __future__ import annotations

import pytest
import torch

from amphista.errors import ConfigError
from amphista.target import shapes
from amphista.target.probe import probe
from amphista.target.shapes import SHAPES, Shape, free_bytes, random_target, without_layers
from amphista.tree.token_tree import TokenTree

TINY = Shape(num_layers=4, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)


@pytest.mark.parametrize(("name", "billions"), [("llama-7b", 6.74), ("llama-13b", 13.02), ("llama-33b", 32.53)])
def test_sizes_are_the_published_ones(name, billions):
    assert SHAPES[name].num_parameters() / 1e9 == pytest.approx(billions, abs=0.005)


def test_llama_2_70b_shares_its_key_value_heads():
    assert SHAPES["llama-70b"].num_parameters() / 1e9 == pytest.approx(68.98, abs=0.005)
    assert SHAPES["llama-70b"].cache_values_per_row() == 2 * 80 * 8 * 128


def test_the_model_has_the_told_size_and_verifies_trees(tiny):
    told = []
    target = random_target("tiny", progress=told.append)
    assert sum(p.numel() for p in target.model.parameters()) == TINY.num_parameters()
    assert target.dtype is torch.float32 and target.spec.num_layers == 4
    assert "0.00 G random weights in float32" in told[0]
    probe(target)


def test_fewer_layers_and_another_dtype(tiny):
    told = []
    target = random_target("tiny", num_layers=2, dtype="bfloat16", progress=told.append)
    assert target.dtype is torch.bfloat16 and target.spec.num_layers == 2
    assert sum(p.numel() for p in target.model.parameters()) == TINY.num_parameters(2)
    assert "2 of its 4 layers" in told[0]


def test_what_does_not_fit_is_refused_before_it_is_built(tiny, monkeypatch):
    def no_building(*arguments):
        raise AssertionError("it was built")

    monkeypatch.setattr(shapes, "_random_model", no_building)
    layer = TINY.parameters_per_layer * 4
    monkeypatch.setattr(shapes, "free_bytes", lambda place: int((TINY.num_parameters(0) * 4 + 2.5 * layer) / 0.9))
    with pytest.raises(ConfigError, match=r"tiny: .* GB are free on cpu: .*--layers 2, .*--dtype bfloat16"):
        random_target("tiny")
    monkeypatch.setattr(shapes, "free_bytes", lambda place: layer)
    with pytest.raises(ConfigError, match="not even one layer fits"):
        random_target("tiny")


def test_caches_count(tiny, monkeypatch):
    room = TINY.num_parameters() * 4 / 0.9 + 10_000
    monkeypatch.setattr(shapes, "free_bytes", lambda place: int(room))
    random_target("tiny", cache_rows=1)
    with pytest.raises(ConfigError, match="are free"):
        random_target("tiny", cache_rows=1000)


@pytest.mark.parametrize("layers", [0, 5])
def test_layers_outside_the_model_are_refused(tiny, layers):
    with pytest.raises(ConfigError, match=r"give 1\.\.4"):
        random_target("tiny", num_layers=layers)


def test_unknown_names_are_told_what_there_is(tiny):
    with pytest.raises(ConfigError, match="llama-7b"):
        random_target("llama-8b")
    with pytest.raises(ConfigError, match="float32"):
        random_target("tiny", dtype="int4")


def test_without_layers_leaves_the_embedding_and_the_head(tiny):
    target = random_target("tiny", progress=lambda line: None)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        whole = target.model(input_ids=ids).logits
        with without_layers(target):
            bare = target.model(input_ids=ids, use_cache=False).logits
        states = target.model.get_decoder().norm(target.model.get_input_embeddings()(ids))
        assert torch.allclose(bare, target.shared.project(states))
        assert torch.equal(target.model(input_ids=ids).logits, whole)  # all layers are back


def test_free_memory_is_what_the_machine_has():
    assert 100e6 < free_bytes(torch.device("cpu")) < 100e12


def test_on_the_fast_path_like_a_loaded_target(tiny):
    target = random_target("tiny", fast=True, progress=lambda line: None)
    assert target.path == "fast"
    with without_layers(target):
        assert target.verify(TokenTree([3], [-1]), target.new_cache()).logits.shape == (1, target.spec.vocab_size)
