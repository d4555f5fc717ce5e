"""evaluation/gather.py: goals beside what was measured; one page of all parts."""

from __future__ import annotations

import json

import pytest

from amphista.errors import DataError
from amphista.evaluation.gather import gather, latency_goals, run_goals
from amphista.evaluation.metrics import summarise
from tests.unit.evaluation.test_metrics import RECORDS
from tests.unit.evaluation.test_report import summary  # noqa: F401

LATENCY = {
    "dtype": "float32",
    "verify": [
        {"batch": 1, "context": 128, "nodes": 1, "ms": 12.0, "least_ms": 10.0},
        {"batch": 1, "context": 128, "nodes": 2, "ms": 13.0, "least_ms": 10.0},
    ],
    "python": [{"drafter": "none", "outside_ms": 1.5}, {"drafter": "amphista", "outside_ms": 2.5}],
    "memory": [
        {"drafter": "none", "settings": {"dtype": "int8"}, "overhead": 1.301},
        {"drafter": "none", "settings": {"dtype": None}, "overhead": 1.2},
    ],
}


def test_a_goal_is_met_or_not():
    assert list(latency_goals("latency", LATENCY)) == [
        ["latency", "forward of 1 row over its limit", "context 128", "", "1.20x", ""],
        ["latency", "Python between operations, a step", "none", "at most 2 ms", "1.50 ms", "yes"],
        ["latency", "Python between operations, a step", "amphista", "at most 2 ms", "2.50 ms", "NO"],
        ["latency", "peak memory over what is needed", "none, int8", "at most 1.3x", "1.30x", "NO"],
        ["latency", "peak memory over what is needed", "none, float32", "at most 1.3x", "1.20x", "yes"],
    ]


def test_a_run_tells_failures_divergences_and_what_was_lost(summary):  # noqa: F811
    summary["efficiency"] = {"fast": {"share": 0.9, "share_interval": (0.8, 1.0)}}
    rows = {(row[1], row[2]): row[3:] for row in run_goals("decode", summary)}
    assert rows["failed answers", "none"] == ["0", "0", "yes"] and rows["failed answers", "fast"] == ["0", "1", "NO"]
    assert rows["same tokens as none", "fast"] == ["100%", "50.0%", "NO"]
    assert rows["realised / possible speedup", "fast"] == ["at least 0.93", "0.90 (0.80 to 1.00)", "NO"]
    assert rows["draft + tree + accept + commit", "fast"] == ["at most 25%", "0.0%", "yes"]
    assert ("plain decoding over HF generate", "none") not in rows


def test_speed_over_stock_is_told_where_it_ran(summary):  # noqa: F811
    stock = [r.__class__(**{**r.__dict__, "method": "hf"}) for r in RECORDS if r.method == "none"]
    summary["measures"] = summarise([*RECORDS, *stock], ["none", "hf", "fast"])
    rows = {(row[1], row[2]): row[3:] for row in run_goals("decode", summary)}
    assert rows["plain decoding over HF generate", "none"] == ["", "1.00x", ""]


def test_one_page_of_all(summary, tmp_path):  # noqa: F811
    with pytest.raises(DataError, match=r"neither run\.json nor folders of runs"):
        gather(tmp_path)
    (tmp_path / "decode").mkdir()
    (tmp_path / "decode" / "summary.json").write_text(json.dumps(summary))
    goals = gather(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert goals in text and "| NO" in goals
    assert "## decode: tiny on own.jsonl" in text and "### Failures" in text
