"""Latency: what is timed is the forward that decoding makes; scaling, ratios and projections are what they say."""

from __future__ import annotations

import json

import pytest
import torch

from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.drafter.captured import AskRegion, FeedRegion
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.drafter.stage_rows import StageHome
from amphista.engine.timing import Cell
from amphista.errors import ConfigError
from amphista.evaluation import latency
from amphista.evaluation.latency import (
    LatencyConfig,
    latency_markdown,
    latency_tables,
    measure_latency,
    project,
    typical_tree,
    write_latency,
)
from amphista.evaluation.methods import timed_drafters
from amphista.target.captured import VerifyRegion
from amphista.target.target import Target
from tests.tiny import VOCAB, tiny_model, tiny_target

CONFIG = LatencyConfig(nodes=(1, 2, 8), contexts=(5, 20), batches=(1, 3), rounds=2)


def both(target):
    return {
        "amphista": Amphista(AmphistaConfig(num_heads=3), target.spec, target.shared).eval(),
        "medusa": Medusa(MedusaConfig(num_heads=3), target.spec, target.shared).eval(),
    }


def test_every_combination_is_there_once():
    target = tiny_target()
    steps = []
    record = measure_latency(target, CONFIG, both(target), lambda done, total, text: steps.append((done, total)))
    places = [(row["batch"], row["context"], row["nodes"]) for row in record["verify"]]
    assert sorted(places) == sorted((b, c, n) for b in (1, 3) for c in (5, 20) for n in (1, 2, 8))
    drafted = [(row["drafter"], row["context"], row.get("nodes")) for row in record["draft"] if row["what"] == "draft"]
    assert sorted(drafted) == sorted((d, c, n) for d in ("amphista", "medusa") for c in (5, 20) for n in (2, 8))
    fed = [(row["drafter"], row["context"], row["rows"]) for row in record["draft"] if row["what"] == "feed"]
    assert sorted(fed) == sorted((d, c, r) for d in ("amphista", "medusa") for c in (5, 20) for r in (1, 2, 4))
    assert all(0 < row["ms_min"] <= row["ms"] <= row["ms_max"] for row in record["verify"] + record["draft"])
    assert all(row["ratio"] == 1 for row in record["verify"] if row["nodes"] == 1)
    assert steps[-1] == (8, 8) and record["measured_layers"] == record["num_layers"] == 2
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("family", ["llama", "mistral-windowed", "gemma3", "gemma2", "gpt2"])
def test_a_batched_forward_gives_every_sequence_the_logits_of_one_alone(family):
    target = tiny_target(family, dtype=torch.float64)
    cache = target.new_cache()
    target.prefill(list(range(3, 23)), cache)
    tree = typical_tree(VOCAB, 8)
    caches = [target.new_cache() for _ in range(3)]
    for copy in caches:
        copy.take_copy(cache, 20)
    alone = target.verify(tree, cache).logits
    batched = latency._forward(target, tree, caches)()
    assert [output.logits.shape for output in batched] == [(8, VOCAB)] * 3
    assert all(torch.allclose(output.logits, alone, atol=1e-9) for output in batched)


def test_layers_scale_round_by_round():
    key = {"batch": 1, "context": 4, "nodes": 1}
    cells = [
        ({"what": "verify", **key}, Cell(lambda: None, seconds=[3.0, 5.0])),
        ({"what": "rest", **key}, Cell(lambda: None, seconds=[1.0, 2.0])),
    ]
    (row,) = latency._merged(cells, 10)
    assert (row["ms_min"], row["ms_max"]) == (21000, 32000)  # 1 + 10 x 2 and 2 + 10 x 3
    assert (row["measured_ms"], row["without_layers_ms"]) == (4000, 1500)


def test_a_cut_target_stands_for_the_whole_and_says_so():
    target = Target(tiny_model(num_hidden_layers=1), name="cut")
    record = measure_latency(target, LatencyConfig(nodes=(1, 4), contexts=(5,), rounds=1, num_layers=40))
    assert (record["measured_layers"], record["num_layers"]) == (1, 40)
    for row in record["verify"]:
        whole, without = row["measured_ms"], row["without_layers_ms"]
        assert without > 0 and row["ms"] == pytest.approx(without + 40 * (whole - without))
    assert "Scaled: 1 distinct layers" in latency_markdown(record)
    with pytest.raises(ConfigError, match="40 layers were asked for"):
        measure_latency(Target(tiny_model(num_hidden_layers=50)), LatencyConfig(num_layers=40))


def test_projection_by_hand():
    verify = [
        {"batch": 1, "context": 9, "nodes": 1, "ms": 100.0},
        {"batch": 1, "context": 9, "nodes": 4, "ms": 110.0},
        {"batch": 8, "context": 9, "nodes": 4, "ms": 900.0},
    ]
    draft = [
        {"what": "draft", "drafter": "d", "context": 9, "nodes": 4, "ms": 30.0},
        {"what": "feed", "drafter": "d", "context": 9, "rows": 1, "ms": 5.0},
        {"what": "feed", "drafter": "d", "context": 9, "rows": 2, "ms": 10.0},
    ]
    (row,) = project(verify, draft)
    assert row == {"drafter": "d", "context": 9, "nodes": 4, "break_even_tau": pytest.approx(1.5)}


@pytest.mark.parametrize("num_nodes", [1, 2, 7, 64, 256])
def test_the_typical_tree_has_the_size_asked_for(num_nodes):
    tree = typical_tree(VOCAB, num_nodes)
    assert tree.num_nodes == num_nodes and max(tree.depths) <= latency.TREE_DEPTH


def test_files_and_words(tmp_path):
    target = tiny_target()
    config = LatencyConfig(nodes=(1, 8), contexts=(5,), rounds=1)
    record = measure_latency(target, config, both(target))
    write_latency(tmp_path / "new" / "folder", record)
    folder = tmp_path / "new" / "folder"
    assert json.loads((folder / "latency.json").read_text()) == record
    page = (folder / "latency.md").read_text()
    assert latency_tables(record) in page and "projected from the times above, not decoded" in page
    lines = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| medusa")]
    assert len(lines) == 2 and float(lines[1][2]) == pytest.approx(record["projection"][1]["break_even_tau"], abs=0.01)
    with pytest.raises(ConfigError, match="cannot write"):
        write_latency(folder / "latency.md" / "below", record)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"nodes": (2, 4)}, "1 must be among them"),
        ({"nodes": ()}, "--nodes"),
        ({"contexts": (0,)}, "--contexts"),
        ({"batches": (2, 2)}, "--batches"),
        ({"rounds": 0}, "--rounds"),
    ],
)
def test_bad_settings(changes, match):
    with pytest.raises(ConfigError, match=match):
        LatencyConfig(**changes)


def test_what_does_not_fit_is_refused(monkeypatch):
    target = tiny_target()
    with pytest.raises(ConfigError, match="beyond the 512 positions"):
        measure_latency(target, LatencyConfig(contexts=(510,)))
    with pytest.raises(ConfigError, match="only 300 tokens"):
        measure_latency(target, LatencyConfig(nodes=(1, 301), contexts=(5,), rounds=1))
    monkeypatch.setattr(latency, "free_bytes", lambda place: 1000)
    with pytest.raises(ConfigError, match="are free on cpu: give smaller --batches"):
        measure_latency(target, CONFIG)


def test_drafters_by_name(caplog):
    caplog.set_level("INFO", "amphista")
    target = tiny_target()
    found = timed_drafters("amphista,medusa", target, draft_vocab=50)
    assert list(found) == ["amphista", "medusa"] and found["medusa"].draft_vocab == 50
    assert "no amphista drafter is shipped" in caplog.text
    assert timed_drafters("none", target) == {} == timed_drafters("", target)
    with pytest.raises(ConfigError, match="twice"):
        timed_drafters("amphista,amphista", target)


def test_recorded_forwards_are_what_is_timed(monkeypatch):
    """Those of a target in fixed shapes, the cut ones included; drafters keep what is asked and what is fed apart."""
    replayed = []
    for kind in (VerifyRegion, AskRegion, FeedRegion):

        def run(region, original=kind.run, kind=kind):
            replayed.append((kind, getattr(region, "num_nodes", None)))
            original(region)

        monkeypatch.setattr(kind, "run", run)
    target = Target(tiny_model(), static=True)
    assert target.speed_up() and target.is_static
    del replayed[:]
    moved = []
    monkeypatch.setattr(StageHome, "move_out", lambda home, state: moved.append(state))
    config = LatencyConfig(nodes=(1, 2, 7), contexts=(20,), rounds=2, num_layers=4)
    record = measure_latency(target, config, both(target))
    assert record["path"] == "fast-static" and not moved
    # each size whole and without layers, three rounds; all that verifies is recorded
    assert sorted(size for kind, size in replayed if kind is VerifyRegion) == [1] * 6 + [2] * 6 + [8] * 6
    assert {kind for kind, _ in replayed} == {VerifyRegion, AskRegion, FeedRegion}
