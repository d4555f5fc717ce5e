"""benchmarks/lab/page.py: goals beside what was measured; one page of all parts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from amphista.errors import DataError
from amphista.evaluation.records import RecordFile
from benchmarks.lab import limits, step_profile
from benchmarks.lab.__main__ import main
from benchmarks.lab.page import latency_goals, run_goals, write_page
from benchmarks.lab.speed_tables import speed_markdown
from tests.unit.evaluation.test_metrics import RECORDS, record
from tests.unit.evaluation.test_report import summary  # noqa: F401

LATENCY = {
    "dtype": "float32",
    "verify": [
        {"context": 128, "nodes": 1, "ms": 12.0, "least_ms": 10.0},
        {"context": 128, "nodes": 2, "ms": 13.0, "least_ms": 10.0},
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
    rows = {(row[1], row[2]): row[3:] for row in run_goals("decode", summary["run"], RECORDS)}
    assert rows["failed answers", "none"] == ["0", "0", "yes"] and rows["failed answers", "fast"] == ["0", "1", "NO"]
    assert rows["same tokens as none", "fast"] == ["100%", "33.3%", "NO"]
    assert rows["draft + tree + accept + commit", "fast"] == ["at most 25%", "0.0%", "yes"]
    assert ("plain decoding over HF generate", "none") not in rows
    costs = {"fast": {"verify_ms": [1000.0] * 4, "draft_ms": 0.0}}
    told = [replace(r, drafted=[1] * len(r.accepted)) for r in RECORDS]
    rows = {row[1]: row[2:] for row in run_goals("decode", summary["run"] | {"costs": costs}, told)}
    name, wanted, share, met = rows["realised / possible speedup"]
    assert (name, wanted, met) == ("fast", "at least 0.93", "yes") and share == "1.60 (1.00 to 2.00)"


def test_speed_over_stock_is_told_where_it_ran(summary):  # noqa: F811
    stock = [replace(r, method="hf") for r in RECORDS if r.method == "none"]
    summary["run"]["settings"]["methods"]["hf"] = {}
    rows = {(row[1], row[2]): row[3:] for row in run_goals("decode", summary["run"], [*RECORDS, *stock])}
    assert rows["plain decoding over HF generate", "none"] == ["", "1.00x", ""]


def test_one_page_of_all(summary, tmp_path):  # noqa: F811
    with pytest.raises(DataError, match=r"no folders with run\.json"):
        write_page(tmp_path)
    (tmp_path / "decode").mkdir()
    (tmp_path / "decode" / "run.json").write_text(json.dumps(summary["run"]))
    RecordFile(tmp_path / "decode" / "records.jsonl", RECORDS)
    goals = write_page(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert goals in text and "| NO" in goals
    assert "## decode: tiny on own.jsonl" in text and "### Failures" in text and "### Time by phase" in text


def test_where_the_time_goes(summary):  # noqa: F811
    phases = {"prefill": 1.0, "draft": 0.2, "tree": 0.1, "verify": 1.2, "accept": 0.1, "commit": 0.2}
    told = [
        record("none", "a1", tokens=301, seconds=301.0, tree_nodes=[1] * 300, drafted=[0] * 300),
        record("hf", "a1", tokens=301, seconds=601.0, phase_seconds={"prefill": 1.0, "generate": 600.0}),
        record("fast", "a1", tokens=301, seconds=201.0, accepted=[1] * 150, drafted=[1] * 75 + [0] * 75,
               phase_seconds={name: 100 * s for name, s in phases.items()} | {"prefill": 1.0}),
    ]  # fmt: skip
    told[1] = replace(told[1], tree_nodes=[1] * 300)
    run = summary["run"] | {"costs": {"fast": {"verify_ms": [1.0, 1.0, 1.0, 1.1], "draft_ms": 0.2}}}
    run["settings"]["methods"] = {"none": {}, "hf": {}, "fast": {}}
    text = " ".join(speed_markdown(run, told).split())
    assert "| fast | 1000.0 | 1333.33 | 133.33 | 66.67 | 800.00 | 66.67 | 133.33 | 133.33 | 30.0% |" in text
    assert "| hf | 1000.0 | 2000.00 | - | - | - | - | - | - | - |" in text
    assert "| fast | 1.67x | 1.50x | 0.90 | 1.20 | 1.33 | +0.100 | -0.100 | +0.133 |" in text
    assert "| fast | 128 to 256 | 1 | 1333.33 | 1.5 | 2.00 | 4.00 | 1.50x | 0% |" in text
    assert "| fast | all | 2.00 | - | 1.50x | 4.0 | 0% | 50% |" in text and "| hf | all" not in text


def test_older_records_do_not_tell_where_heads_were_asked(summary):  # noqa: F811
    assert "| fast | all  | 2.00 (2.00 to 2.00) | -" not in speed_markdown(summary["run"], RECORDS)
    line = next(line for line in speed_markdown(summary["run"], RECORDS).splitlines() if "| fast   | all" in line)
    assert line.rstrip(" |").endswith("-")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from there")
def test_the_commands_make_a_page(target_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(limits, "READ_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(limits, "MATRIX_SIZE", {"cpu": 64})
    monkeypatch.setattr(step_profile, "CALIBRATIONS", 3)
    main(["latency", "--out", str(tmp_path / "latency"), "--target", str(target_folder), "--drafters", "none",
          "--nodes", "1,2", "--contexts", "6", "--rounds", "1", "--memory-dtypes", "bfloat16"])  # fmt: skip
    assert "Python between operations, a step none" in capsys.readouterr().out
    record = json.loads((tmp_path / "latency" / "latency.json").read_text())
    assert all(row["least_ms"] > 0 for row in record["verify"])
    main(["page", str(tmp_path)])
    page = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out.strip() in page
    assert "none, bfloat16" in page and "### Against what the machine allows" in page and "### Memory" in page
    with pytest.raises(SystemExit):
        main(["page", str(tmp_path / "latency")])
    assert "expected one of several --out folders" in capsys.readouterr().err


def test_the_committed_parts_still_make_a_page(tmp_path):
    """Records of an earlier form."""
    there = Path(__file__).parents[3] / "benchmarks" / "zen5-2-cores" / "speed"
    for part in ("decode", "latency"):
        shutil.copytree(there / part, tmp_path / part)
    goals = write_page(tmp_path)
    assert "peak memory over what is needed" in goals and "plain decoding over HF generate" in goals
