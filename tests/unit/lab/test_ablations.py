"""A plan of ablations: equal terms for all, nothing run twice, the rest refused before anything starts."""

from __future__ import annotations

import json

import pytest

from amphista.errors import ConfigError
from amphista.train.trainer import Trainer
from benchmarks.lab import ablations
from benchmarks.lab.ablations import Ablations, Plan, rows_of, table_lines
from tests.tiny import tiny_target

PLAN = """
seeds = [0, 1]
[base]
save_every = 2
[base.model]
num_heads = 2
[base.data]
validation_share = 0.3
[base.optimizer]
max_steps = 3
[search]
max_steps = 2
[search.rates]
full = [1e-3, 1e-2]
medusa = [1e-3, 1e-2]
[runs.full]
[runs.medusa]
drafter = "medusa"
[runs.one-stage.model]
stages = 1
"""


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture
def data(tmp_path):
    lines = [
        {"id": f"p{i}", "prompt_ids": [i, 2, 3], "answer_ids": [(i * j) % 40 for j in range(1, 9)], "temperature": t}
        for i in range(20)
        for t in [0.0 if i % 2 else 0.7]
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def plan_of(tmp_path, text=PLAN):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return Plan.read(path)


def make(target, tmp_path, data, text=PLAN, report=lambda line: None):
    return Ablations(target, plan_of(tmp_path, text), [data], tmp_path / "out", report)


@pytest.fixture
def trained(monkeypatch):
    """Every training run that is started: (folder, config)."""
    started = []
    run = Trainer.run

    def watched(self, stop_after=None):
        started.append((self.out.name, self.config))
        return run(self, stop_after)

    monkeypatch.setattr(Trainer, "run", watched)
    return started


def test_all_runs_on_equal_terms_and_nothing_twice(target, tmp_path, data, trained):
    results = make(target, tmp_path, data).run()
    assert [(r["run"], r["seed"]) for r in results] == [
        (name, seed) for name in ("full", "medusa", "one-stage") for seed in (0, 1)
    ]
    searched = [name for name, _ in trained if name.startswith("search")]
    assert searched == ["search-full-0.001", "search-full-0.01", "search-medusa-0.001", "search-medusa-0.01"]
    full = {name: config for name, config in trained if not name.startswith("search")}
    assert {(c.optimizer.max_steps, c.data.files, c.data.seed) for c in full.values()} == {(3, (str(data),), 0)}
    assert full["one-stage-seed1"].optimizer.learning_rate == full["full-seed0"].optimizer.learning_rate
    assert full["one-stage-seed1"].seed == 1 and full["one-stage-seed1"].model["stages"] == 1
    count = len(trained)
    assert make(target, tmp_path, data).run() == results and len(trained) == count
    (tmp_path / "out" / "medusa-seed1" / "result.json").unlink()
    assert len(make(target, tmp_path, data).run()) == 6 and len(trained) == count + 1


def test_the_search_takes_the_rate_with_the_highest_tau(target, tmp_path, data, monkeypatch):
    monkeypatch.setattr(ablations, "_tau", lambda result, nodes, kind="tau": RATES[result["run"]][rate_of(result)])
    said = []
    RATES = {"full": {1e-3: 1.2, 1e-2: 1.9}, "medusa": {1e-3: 1.3, 1e-2: 1.1}, "one-stage": {1e-2: 1.0}}
    results = make(target, tmp_path, data, report=said.append).run(["full", "medusa", "one-stage"])
    chosen = {result["run"]: rate_of(result) for result in results}
    assert chosen == {"full": 1e-2, "medusa": 1e-3, "one-stage": 1e-2}
    assert any("full: learning rate 0.01" in line for line in said)


def rate_of(result):
    return result["identity"]["config"]["optimizer"]["learning_rate"]


def test_only_some(target, tmp_path, data, trained):
    results = make(target, tmp_path, data).run(["one-stage"])
    assert [(r["run"], r["seed"]) for r in results] == [("one-stage", 0), ("one-stage", 1)]
    assert not any("medusa" in name for name, _ in trained)
    with pytest.raises(ConfigError, match="no run 'two-stage'"):
        make(target, tmp_path, data).run(["two-stage"])


def test_results_of_other_settings_or_data_are_refused(target, tmp_path, data):
    make(target, tmp_path, data).run(["full"])
    with pytest.raises(ConfigError, match=r"holds another run: "):
        make(target, tmp_path, data, PLAN.replace("num_heads = 2", "num_heads = 3")).run(["full"])
    data.write_text(data.read_text() + data.read_text().replace('"p', '"q'))
    with pytest.raises(ConfigError, match=r"holds another run: "):
        make(target, tmp_path, data).run(["full"])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (PLAN.replace("stages = 1", "stage = 1"), "runs.one-stage.model.stage'.*stages"),
        (PLAN.replace('"medusa"\n[runs.one', '"madusa"\n[runs.one'), "unknown drafter 'madusa'"),
        (PLAN.replace('drafter = "medusa"', 'drafters = "medusa"'), "drafter"),
        (PLAN.replace("medusa = [1e-3", "madusa = [1e-3"), "madusa"),
        ("seeds = [0]\n[base]\n[runs]\n", "runs.NAME"),
    ],
)
def test_bad_plans_are_found_before_anything_runs(target, tmp_path, data, text, match, trained):
    with pytest.raises(ConfigError, match=match):
        make(target, tmp_path, data, text).run(["one-stage"])
    assert not trained


def result(run, seed, taus, acceptance=(0.5, 0.25)):
    parts = {
        kind: {
            "tau": dict.fromkeys(("4", "8", "16", "64"), tau),
            "tau_loop_free": dict.fromkeys(("4", "8", "16", "64"), tau),
            "acceptance": list(acceptance),
            "positions": 100,
        }
        for kind, tau in zip(("greedy", "sampled"), taus, strict=True)
    }
    config = {"optimizer": {"learning_rate": 1e-3}}
    return {
        "run": run,
        "seed": seed,
        "identity": {"config": config},
        "parameters": 1_500_000,
        "progress": {"positions": 7},
        "validation": parts,
    }


def test_the_table_by_hand():
    rows = rows_of([result("full", 0, (2.0, 2.0)), result("full", 1, (4.0, 4 / 3)), result("medusa", 0, (1.0, 2.0))])
    full, medusa = rows
    assert full["tau"]["16"] == pytest.approx(2.0) and full["spread"] == pytest.approx(0.0)  # 200 / (25 + 75)
    assert medusa["tau"]["16"] == pytest.approx(200 / 150)
    assert full["acceptance"] == pytest.approx([0.5, 0.25])
    lines = list(table_lines(rows))
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "| full | 2 | 1.5 M | 0.001 |" in lines[2]
