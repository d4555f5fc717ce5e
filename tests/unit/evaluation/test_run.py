"""evaluation/run.py and summary.py: interleaving, crashes, kills, resumes, seeds, and what is found of losslessness."""

from __future__ import annotations

import json

import pytest

from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.errors import ConfigError
from amphista.evaluation.methods import METHODS, MethodSettings, Ours, parse_methods
from amphista.evaluation.metrics import contract
from amphista.evaluation.questions import load_questions
from amphista.evaluation.records import read_records
from amphista.evaluation.report import markdown_tables, write_report
from amphista.evaluation.run import Evaluation, EvaluationConfig, answer_seed
from amphista.evaluation.summary import ACCEPTED
from amphista.kernels.graph import Recorder
from amphista.target.target import Target
from amphista.target.text import Text
from tests.tiny import Amphista, AmphistaConfig, byte_tokenizer, shaken, tiny_model

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["First?", "Second?"]},
    {"question_id": 2, "category": "qa", "turns": ["Only?"]},
    {"question": "Ann has 2 pears and buys 1. How many?", "answer": "#### 3", "category": "maths"},
]


class Crashing(Ours):
    """Raises on every second answer."""

    calls = 0

    def run(self, prompt_ids, params):
        self.calls += 1
        if self.calls % 2 == 0:
            raise ZeroDivisionError("on purpose")
        return super().run(prompt_ids, params)


class Lying(Ours):
    """Changes the third token: a method that is not lossless."""

    def run(self, prompt_ids, params):
        outcome = super().run(prompt_ids, params)
        ids = outcome["token_ids"]
        changed = [*ids[:2], (ids[2] + 1) % 200, *ids[3:]]
        return outcome | {"token_ids": changed, "pieces": [*outcome["pieces"], "!"]}


def drafting(kind, tree="6"):
    def build(spec, target, settings):
        drafter = shaken(Amphista(AmphistaConfig(num_heads=3), target.spec, target.shared))
        return kind(target, drafter, tree, {"drafter": "amphista", "tree": tree})

    return build


@pytest.fixture(autouse=True)
def _methods(monkeypatch):
    for name, kind in {"drafts": Ours, "crashes": Crashing, "lies": Lying}.items():
        monkeypatch.setitem(METHODS, name, drafting(kind))


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    return load_questions(str(path))


def config(methods="none,hf,drafts", **changes):
    sampling = {"max_new_tokens": 10, "temperature": changes.pop("temperature", 0.0), "seed": changes.pop("seed", 0)}
    return EvaluationConfig(
        methods=tuple(parse_methods(methods)), params=SamplingParams(**sampling), settings=MethodSettings(), **changes
    )


def evaluate(target, asked, out, **changes):
    with Evaluation(target, asked, config(**changes), out) as evaluation:
        evaluation.run()
        return evaluation, evaluation.finish()


def tokens(records):
    return [(r.group, r.method, r.token_ids) for r in records]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_run(text_target, asked, tmp_path, temperature):
    evaluation, summary = evaluate(text_target, asked, tmp_path / "out", temperature=temperature, repeats=2)
    records = read_records(tmp_path / "out" / "records.jsonl")
    assert records == evaluation.records and len(records) == evaluation.num_records == 4 * 3 * 2
    assert [r.method for r in records[:3]] == ["none", "hf", "drafts"]
    everything = summary["measures"]["all"]
    assert everything["drafts"]["identical"] == 1.0 and everything["drafts"]["compared"] == 8
    assert everything["hf"]["identical"] == (1.0 if temperature == 0 else None)
    assert everything["none"]["tau"] == everything["hf"]["tau"] == 1.0
    assert set(summary["measures"]) == {"all", "mt_bench", "qa", "maths"}
    settings = summary["run"]["settings"]["methods"]
    assert settings["none"]["dtype"] == settings["hf"]["dtype"] == "float32" and settings["none"]["path"]
    by_group = {(r.group, r.method): r for r in records}
    second = by_group[(0, "1", 1), "none"]
    first = by_group[(0, "1", 0), "none"]
    assert second.num_prompt_tokens > first.num_prompt_tokens + len(first.token_ids)
    if temperature:
        assert by_group[(0, "2", 0), "none"].token_ids != by_group[(1, "2", 0), "none"].token_ids
    question_text = (tmp_path / "out" / "records.jsonl").read_text() + json.dumps(summary)
    assert "Second?" not in question_text and "Ann has" not in question_text


def test_recorded_forwards_give_the_same_run_and_none_is_recorded_in_it(asked, tmp_path, monkeypatch):
    """What needs recording is recorded before the first answer."""
    runs = []
    for static in (True, False):
        target = Target(tiny_model(), Text(byte_tokenizer()), static=static)
        assert target.speed_up() and target.is_static == static
        recorded = []
        with (
            Evaluation(target, asked, config("none,drafts"), tmp_path / str(static)) as evaluation,
            monkeypatch.context() as patch,
        ):
            if static:
                evaluation._warm_up()

            def record(recorder, run, recorded=recorded, original=Recorder.record):
                recorded.append(run)
                return original(recorder, run)

            patch.setattr(Recorder, "record", record)
            runs.append(evaluation.run())
        assert recorded == [] and evaluation.run_record["settings"]["path"] == ("fast-static" if static else "fast")
    assert tokens(runs[0]) == tokens(runs[1])
    assert [record.accepted for record in runs[0]] == [record.accepted for record in runs[1]]


def test_the_same_command_gives_the_same_tokens_elsewhere(text_target, asked, tmp_path):
    one, _ = evaluate(text_target, asked, tmp_path / "one", temperature=0.9)
    two, _ = evaluate(text_target, asked, tmp_path / "two", temperature=0.9)
    other, _ = evaluate(text_target, asked, tmp_path / "other", temperature=0.9, seed=1)
    assert tokens(one.records) == tokens(two.records) != tokens(other.records)


def test_a_crash_is_a_failed_record_and_never_a_number(text_target, asked, tmp_path):
    evaluation, summary = evaluate(text_target, asked, tmp_path / "out", methods="none,crashes")
    failed = [r for r in evaluation.records if r.failed]
    assert [r.method for r in failed] == ["crashes"] * len(failed) and failed
    assert all("ZeroDivisionError: on purpose" in r.error or r.error == "the turn before failed" for r in failed)
    assert failed[0].group == (0, "1", 0) and failed[1].error == "the turn before failed"
    crashes = summary["measures"]["all"]["crashes"]
    assert crashes["failed"] == len(failed) == len(summary["failures"])
    assert crashes["num_answers"] == 4 - len(failed)
    assert any("failed" in note for note in summary["notes"])


def test_nine_crashes_of_ten_are_told_truly(text_target, tmp_path, monkeypatch):
    """One answer in ten is the same tokens; the other nine are crashes, which are not."""

    class Surviving(Ours):
        calls = -1  # the warm-up comes first

        def run(self, prompt_ids, params):
            self.calls += 1
            if self.calls > 1:
                raise ZeroDivisionError("on purpose")
            return super().run(prompt_ids, params)

    monkeypatch.setitem(METHODS, "survives", drafting(Surviving))
    path = tmp_path / "ten.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(10)))
    for temperature in (0.0, 0.8):
        out = tmp_path / str(temperature)
        _, summary = evaluate(
            text_target, load_questions(str(path)), out, methods="none,hf,survives", temperature=temperature
        )
        found = summary["measures"]["all"]["survives"]
        assert (found["failed"], found["num_answers"], found["compared"]) == (9, 1, 10)
        assert found["identical"] == 0.1 and len(summary["failures"]) == 9 and summary["divergences"] == []
        assert "| 10.0% of 10 " in markdown_tables(summary) and "| 9 of 10 |" in markdown_tables(summary)
        assert any("9 of 30 answers failed" in note for note in summary["notes"])
        told = contract(summary["measures"], 10)["methods"]["survives"]
        assert told == told | {"identical": 0.1, "compared": 10, "failed": 9, "num_answers": 1}
    assert summary["measures"]["all"]["hf"]["compared"] == 0, "stock noise is its own"


def test_where_none_itself_failed_nothing_is_compared(text_target, asked, tmp_path, monkeypatch):
    def build(spec, target, settings):
        return Crashing(target, Proposer(), "1", {"drafter": "none"})

    monkeypatch.setitem(METHODS, "none", build)
    _, summary = evaluate(text_target, asked, tmp_path / "out", methods="none,drafts")
    measures = summary["measures"]["all"]
    assert measures["none"]["failed"] > 0
    assert measures["drafts"]["compared"] == measures["none"]["num_answers"] and measures["drafts"]["identical"] == 1


def test_questions_answered_together_have_the_tokens_of_each_alone(text_target, asked, tmp_path):
    one_by_one, _ = evaluate(text_target, asked, tmp_path / "one", methods="none,drafts", temperature=0.8)
    together, summary = evaluate(
        text_target, asked, tmp_path / "batch", methods="none,drafts", temperature=0.8, batch_size=3
    )

    def told(evaluation):
        return {(r.group, r.method): (r.token_ids, r.seed, r.matches, r.text) for r in evaluation.records}

    assert told(together) == told(one_by_one) and len(told(together)) == together.num_records
    assert summary["run"]["settings"]["batch_size"] == 3
    with pytest.raises(ConfigError, match="leave out --batch-size or the hf methods"):
        evaluate(text_target, asked, tmp_path / "no", methods="none,hf", batch_size=2)
    with pytest.raises(ConfigError, match="another run"):
        evaluate(text_target, asked, tmp_path / "batch", methods="none,drafts", temperature=0.8)


def test_two_runs_in_one_folder_are_kept_apart(text_target, asked, tmp_path):
    with Evaluation(text_target, asked, config(), tmp_path / "out") as evaluation:
        before = (tmp_path / "out" / "records.jsonl").stat().st_ino
        with pytest.raises(ConfigError, match="another process is evaluating into"):
            Evaluation(text_target, asked, config(), tmp_path / "out")
        assert (tmp_path / "out" / "records.jsonl").stat().st_ino == before, "left alone"
        evaluation.run()
    evaluate(text_target, asked, tmp_path / "out")


def test_a_divergence_is_found_with_its_place_and_margin(text_target, asked, tmp_path):
    evaluation, summary = evaluate(text_target, asked, tmp_path / "out", methods="none,drafts,lies")
    found = summary["divergences"]
    assert {f["method"] for f in found} == {"lies"} and len(found) == 4
    assert found[0]["position"] == 2 and found[0]["margin"] > 0
    assert found[1]["earlier_turn"] is True and found[1]["turn"] == 1
    assert summary["measures"]["all"]["lies"]["identical"] == 0.0
    assert [r.matches for r in evaluation.records if r.method == "drafts"] == [True] * 4


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_a_killed_run_resumes_to_the_same_records(text_target, asked, tmp_path, kept):
    whole, _ = evaluate(text_target, asked, tmp_path / "whole")

    def stop(done, total, text):
        if done == 3 * kept:
            raise KeyboardInterrupt

    with Evaluation(text_target, asked, config(), tmp_path / "broken") as broken:
        if kept:
            with pytest.raises(KeyboardInterrupt):
                broken.run(stop)
    path = tmp_path / "broken" / "records.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id":"2","cat')
    resumed, summary = evaluate(text_target, asked, tmp_path / "broken")
    assert tokens(resumed.records) == tokens(whole.records)
    assert tokens(read_records(path)) == tokens(whole.records)
    assert any("resumed" in note for note in summary["notes"]) == bool(kept)


def test_a_finished_run_is_not_measured_again(text_target, asked, tmp_path, monkeypatch):
    first, _ = evaluate(text_target, asked, tmp_path / "out")
    monkeypatch.setattr(Evaluation, "_answers", None)
    again, _ = evaluate(text_target, asked, tmp_path / "out")
    assert again.records == first.records


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": "none,drafts"}, r"another run: methods is none \(1\), drafts \([^;]*\. Give"),
        ({"seed": 4}, r"params\.seed is 4, there it is 0\. Give"),
        ({"repeats": 2}, "repeats"),
    ],
)
def test_another_run_is_refused_and_nothing_lost(text_target, asked, tmp_path, changes, said):
    evaluate(text_target, asked, tmp_path / "out")
    before = (tmp_path / "out" / "records.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=said):
        Evaluation(text_target, asked, config(**changes), tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"another run: questions is 1 of 3 of q\.jsonl, there it is 3 of 3[^;]*\. Give"
    ):
        Evaluation(text_target, asked.sample(1), config(), tmp_path / "out")
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == before


def test_another_type_of_the_same_target_is_another_run(asked, tmp_path):
    """Path and the type of what flows between weights are the same."""
    targets = [Target(tiny_model(), Text(byte_tokenizer()), name="t") for _ in range(2)]
    assert targets[0].speed_up() and targets[1].speed_up(int8=True, native=True)
    evaluate(targets[0], asked, tmp_path / "out", methods="none")
    with pytest.raises(ConfigError, match="dtype is int8, there it is float32"):
        Evaluation(targets[1], asked, config("none"), tmp_path / "out")


def test_folders_that_cannot_be(text_target, asked, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to"):
        Evaluation(text_target, asked, config(), tmp_path / "file")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "records.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"holds records.jsonl but no run.json"):
        Evaluation(text_target, asked, config(), tmp_path / "odd")


def test_seeds_are_unrelated_and_fixed():
    seeds = {answer_seed(s, q, t, r) for s in range(3) for q in ("1", "11", 2) for t in range(3) for r in range(3)}
    assert len(seeds) == 81 and all(0 <= seed < 2**64 for seed in seeds)
    assert answer_seed(0, 1, 0, 0) == answer_seed(0, "1", 0, 0)


def test_a_run_without_a_seed_is_the_run_of_seed_0(text_target, asked, tmp_path):
    unseeded = EvaluationConfig(
        methods=config("none").methods,
        params=SamplingParams(max_new_tokens=10, temperature=0.8),
        settings=MethodSettings(),
    )
    with Evaluation(text_target, asked, unseeded, tmp_path / "out") as evaluation:
        evaluation.run()
    assert [r.seed for r in evaluation.records[:2]] == [answer_seed(0, "1", turn, 0) for turn in (0, 1)]
    evaluate(text_target, asked, tmp_path / "out", methods="none", temperature=0.8, seed=0)  # goes on in it


def test_methods_lead_in_turn(text_target, asked, tmp_path, monkeypatch):
    order = []
    answer = Evaluation._answers
    monkeypatch.setattr(
        Evaluation, "_answers", lambda self, name, *rest: order.append(name) or answer(self, name, *rest)
    )
    monkeypatch.setattr(Evaluation, "_warm_up", lambda self: None)
    evaluate(text_target, asked, tmp_path / "out", methods="none,hf,drafts")
    assert order[::3] == ["none", "hf", "hf", "drafts"]


def test_settings():
    with pytest.raises(ConfigError, match="--repeats is 0"):
        config(repeats=0)


def test_samples_are_the_answers_themselves(text_target, asked, tmp_path):
    _, summary = evaluate(text_target, asked, tmp_path / "out")
    for sample in summary["samples"]:
        record = next(r for r in read_records(tmp_path / "out" / "records.jsonl") if r.id == sample["id"])
        assert "".join(text for text, _ in sample["tokens"]) == record.text
        assert any(kind == ACCEPTED for _, kind in sample["tokens"])


def test_a_question_longer_than_the_context_fails_by_name(text_target, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 600}) + "\n" + json.dumps({"prompt": "short"}) + "\n")
    evaluation, _ = evaluate(text_target, load_questions(str(path)), tmp_path / "out")
    errors = [r.error for r in evaluation.records]
    assert all("context holds 512" in error for error in errors[:3]) and errors[3:] == [None] * 3


def test_the_costs_of_drafting_methods_stand_in_the_record_and_bind_no_resumed_run(text_target, asked, tmp_path):
    """They belong to the machine: measured anew, the same command still goes on in its folder."""
    _, summary = evaluate(text_target, asked, tmp_path, methods="lookup,drafts")
    assert list(summary["run"]["costs"]) == ["lookup", "drafts"], (
        "what fixed trees cost is told, too; none drafts nothing"
    )
    known = summary["run"]["costs"]["lookup"]
    assert known["draft_ms"] == 0 and known["verify_ms"] == sorted(known["verify_ms"]) and len(known["verify_ms"]) > 1
    record = json.loads((tmp_path / "run.json").read_text())
    record["costs"]["lookup"]["verify_ms"] = [1.0, 9.0]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert evaluate(text_target, asked, tmp_path, methods="lookup,drafts")[1]["measures"] == summary["measures"]


def test_a_hostile_question_file_runs_nothing_writes_nowhere_and_spoils_no_report(text_target, tmp_path, monkeypatch):
    """Tests and entry points beside a prompt, ids that look like paths, markup of every kind, a prompt without end."""
    canary = tmp_path / "canary"
    code = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"
    lines = [
        {"task_id": "../../up", "prompt": code, "entry_point": "f", "test": code, "canonical_solution": code},
        {"id": str(canary), "prompt": "One?", "category": "$\\\\frac{$ | [/] {{ 7 * 7 }} <script>", "check": code},
        {"id": "__import__", "question": "Two?", "answer": code, "category": "../canary", "kind": "humaneval"},
        {"id": "{0.__class__}", "prompt": "x" * 300_000},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    out = tmp_path / "out"
    evaluation, summary = evaluate(text_target, load_questions(str(path)), out, methods="none,drafts")
    write_report(out, summary)
    assert [record.failed for record in evaluation.records] == [False] * 6 + [True] * 2
    assert "context holds 512" in evaluation.records[-1].error
    assert {p.name for p in tmp_path.iterdir()} == {"here", "out", "questions.jsonl"}
    assert not list((tmp_path / "here").iterdir()) and len(list(out.iterdir())) == 6, "five files and the lock"
    page = (out / "report.html").read_text()
    assert "<script>" not in page and "{{ 7 * 7 }}" in page
    assert summary["measures"]["all"]["drafts"]["num_answers"] == 3, "questions without a category are not all of them"
