"""Latency: what is timed is the forward that decoding makes; ratios and projections are what they say."""

from __future__ import annotations

import json

import pytest

from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.drafter.captured_drafter import AskRegion, FeedRegion
from amphista.drafter.checkpoint import save_drafter
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.drafter.stage_buffer import StageBuffer
from amphista.errors import ConfigError
from amphista.evaluation import latency
from amphista.evaluation.latency import (
    LatencyConfig,
    derived,
    latency_tables,
    measure_latency,
    typical_tree,
    write_latency,
)
from amphista.evaluation.methods import timed_drafters
from amphista.target.captured_forward import VerifyRegion
from amphista.target.target import Target
from tests.tiny import VOCAB, tiny_model, tiny_target

CONFIG = LatencyConfig(nodes=(1, 2, 8), contexts=(5, 20), rounds=2)


def both(target):
    return {
        "amphista": Amphista(AmphistaConfig(num_heads=3), target.spec, target.shared).eval(),
        "medusa": Medusa(MedusaConfig(num_heads=3), target.spec, target.shared).eval(),
    }


def test_every_combination_is_there_once():
    target = tiny_target()
    steps = []
    record = measure_latency(target, CONFIG, both(target), lambda done, total, text: steps.append((done, total)))
    places = [(row["context"], row["nodes"]) for row in record["verify"]]
    assert sorted(places) == sorted((c, n) for c in (5, 20) for n in (1, 2, 8))
    drafted = [(row["drafter"], row["context"], row.get("nodes")) for row in record["draft"] if row["what"] == "draft"]
    assert sorted(drafted) == sorted((d, c, n) for d in ("amphista", "medusa") for c in (5, 20) for n in (2, 8))
    fed = [(row["drafter"], row["context"], row["rows"]) for row in record["draft"] if row["what"] == "feed"]
    assert sorted(fed) == sorted((d, c, r) for d in ("amphista", "medusa") for c in (5, 20) for r in (1, 2, 4))
    assert all(0 < row["ms_min"] <= row["ms"] <= row["ms_max"] for row in record["verify"] + record["draft"])
    assert all(row["ratio"] == 1 for row in record["verify"] if row["nodes"] == 1)
    assert steps[-1] == (4, 4)
    assert json.loads(json.dumps(record)) == record


def test_projection_by_hand():
    verify = [
        {"context": 9, "nodes": 1, "ms": 100.0},
        {"context": 9, "nodes": 4, "ms": 110.0},
    ]
    draft = [
        {"what": "draft", "drafter": "d", "context": 9, "nodes": 4, "ms": 30.0},
        {"what": "feed", "drafter": "d", "context": 9, "rows": 1, "ms": 5.0},
        {"what": "feed", "drafter": "d", "context": 9, "rows": 2, "ms": 10.0},
    ]
    (row,) = derived(verify, draft)["projection"]
    assert [row["ratio"] for row in verify] == [1, 1.1]
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
        ({"nodes": (1, 2, 2)}, "--nodes"),
        ({"rounds": 0}, "--rounds"),
    ],
)
def test_bad_settings(changes, match):
    with pytest.raises(ConfigError, match=match):
        LatencyConfig(**changes)


def test_what_does_not_fit_is_refused():
    target = tiny_target()
    with pytest.raises(ConfigError, match="beyond the 512 positions"):
        measure_latency(target, LatencyConfig(contexts=(510,)))
    with pytest.raises(ConfigError, match="only 300 tokens"):
        measure_latency(target, LatencyConfig(nodes=(1, 301), contexts=(5,), rounds=1))


def test_drafters_by_name(caplog, tmp_path):
    caplog.set_level("INFO", "amphista")
    target = tiny_target()
    assert timed_drafters("amphista,lookup", target) == {}
    assert "no amphista drafter is shipped" in caplog.text
    assert timed_drafters("none", target) == {} == timed_drafters("", target)
    save_drafter(both(target)["medusa"], tmp_path / "mine", target.fingerprint, card="", training={})
    assert list(timed_drafters(f"mine={tmp_path / 'mine'}", target)) == ["mine"]
    with pytest.raises(ConfigError, match="twice"):
        timed_drafters(f"mine={tmp_path / 'mine'},mine=lookup", target)


def test_recorded_forwards_are_what_is_timed(monkeypatch):
    """Those of a target in fixed shapes; drafters keep what is asked and what is fed apart."""
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
    monkeypatch.setattr(StageBuffer, "detach", lambda buffer, state: moved.append(state))
    config = LatencyConfig(nodes=(1, 2, 7), contexts=(20,), rounds=2)
    record = measure_latency(target, config, both(target))
    assert record["path"] == "fast-static" and not moved
    # each size in three rounds; all that verifies is recorded
    assert sorted(size for kind, size in replayed if kind is VerifyRegion) == [1] * 3 + [2] * 3 + [8] * 3
    assert {kind for kind, _ in replayed} == {VerifyRegion, AskRegion, FeedRegion}
