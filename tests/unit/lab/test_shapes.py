"""Random-weight targets: sizes as published, told before they are built, refused where they do not fit."""

from __future__ import annotations

import pytest
import torch

from amphista.errors import ConfigError
from amphista.evaluation.latency import LatencyConfig
from amphista.target.exactness import check_exactness
from benchmarks.lab import shapes
from benchmarks.lab.shapes import SHAPES, Shape, free_bytes, measure_shape, random_drafter, random_target

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
    check_exactness(target)


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


def test_free_memory_is_what_the_machine_has():
    assert 100e6 < free_bytes(torch.device("cpu")) < 100e12


def test_on_the_fast_path_like_a_loaded_target(tiny):
    target = random_target("tiny", fast=True, progress=lambda line: None)
    assert target.path == "fast"


CONFIG = LatencyConfig(nodes=(1, 4), contexts=(6,), rounds=1)


def test_a_cut_shape_stands_for_the_whole_and_says_so(tiny, monkeypatch):
    monkeypatch.setattr(shapes, "measure_latency", lambda target, *rest: timed(10.0 + 2.0 * target.spec.num_layers))
    _, record = measure_shape("tiny", 3, CONFIG, ["medusa"])
    assert (record["measured_layers"], record["num_layers"]) == (3, 4)
    assert [(row["measured_ms"], row["ms"], row["ratio"]) for row in record["verify"]] == [
        (16, 18, 1),
        (17, 19, 19 / 18),
    ]
    assert record["projection"][0]["break_even_tau"] == pytest.approx((19 + 5 + 1) / 18)
    with pytest.raises(ConfigError, match="at least 2"):
        measure_shape("tiny", 1, CONFIG, [])


def timed(milliseconds):
    verify = [{"context": 6, "nodes": 1, "ms": milliseconds}, {"context": 6, "nodes": 4, "ms": milliseconds + 1}]
    key = {"drafter": "medusa", "context": 6}
    draft = [{"what": "draft", **key, "nodes": 4, "ms": 5.0}, {"what": "feed", **key, "rows": 2, "ms": 1.0}]
    return {"verify": verify, "draft": draft}


def test_a_whole_shape_is_measured_as_it_is(tiny):
    target, record = measure_shape("tiny", None, CONFIG, ["amphista"], draft_vocab=50)
    assert target.spec.num_layers == record["num_layers"] == record["measured_layers"] == 4
    assert record["drafters"]["amphista"]["draft_vocab"] == 50
    row = record["projection"][0]
    forwards = {(cell["context"], cell["nodes"]): cell["ms"] for cell in record["verify"]}
    asked = [("draft", row["nodes"]), ("feed", 2)]
    here = [cell for cell in record["draft"] if cell["context"] == row["context"]]
    drafting = sum(cell["ms"] for cell in here if (cell["what"], cell.get("nodes") or cell.get("rows")) in asked)
    step = forwards[row["context"], row["nodes"]] + drafting
    assert row["break_even_tau"] == pytest.approx(step / forwards[row["context"], 1])  # whatever was measured


def test_a_drafter_without_room_is_refused(tiny, monkeypatch):
    target = random_target("tiny", progress=lambda line: None)
    monkeypatch.setattr(shapes, "free_bytes", lambda place: 1000)
    with pytest.raises(ConfigError, match="leave it out of --drafters"):
        random_drafter("medusa", target)
