"""`amphista evaluate` and `report` as users meet them: the contract, bad input, a resume after a kill."""

from __future__ import annotations

import json

import pytest

from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.drafter.checkpoint import save_drafter
from amphista.target.loading import load_target
from tests.system.test_cli import amphista
from tests.tiny import shaken

NUMBERS = {
    "num_answers",
    "compared",
    "tau",
    "tau_loop_free",
    "tokens_per_second",
    "decode_tokens_per_second",
    "speedup",
    "speedup_interval",
    "decode_speedup",
    "speedup_hf",
    "identical",
    "num_tokens",
    "failed",
}


@pytest.fixture(scope="module")
def drafter_folder(target_folder, tmp_path_factory):
    """A drafter nobody trained: it accepts next to nothing and must change no token."""
    target = load_target(str(target_folder))
    drafter = shaken(Amphista(AmphistaConfig(num_heads=3), target.spec, target.shared))
    folder = tmp_path_factory.mktemp("drafter") / "broken"
    save_drafter(drafter, folder, target.fingerprint, card="# never trained\n", training={})
    return folder


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [
        {"question_id": 1, "category": "writing", "turns": ["First?", "Second?"]},
        {"question_id": 2, "category": "qa", "turns": ["Only?"]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_contract(target_folder, drafter_folder, questions, tmp_path):
    command = ["evaluate", questions, "--target", target_folder, "--methods", f"hf,hf-lookup,mine={drafter_folder}@4",
               "--max-new-tokens", 8, "--out", tmp_path / "out", "--json"]  # fmt: skip
    result = amphista(*command)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["questions"] == 2 and list(found["methods"]) == ["none", "hf", "hf-lookup", "mine"]
    assert all(set(numbers) == NUMBERS for numbers in found["methods"].values())
    none, mine = found["methods"]["none"], found["methods"]["mine"]
    assert (none["speedup"], none["tau"], found["methods"]["hf"]["tau"]) == (1.0, 1.0, 1.0)
    assert mine["identical"] == 1.0 and mine["failed"] == 0 and mine["num_tokens"] == none["num_tokens"]
    assert mine["speedup_interval"][0] <= mine["speedup"] <= mine["speedup_interval"][1]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "run.json",
        "records.jsonl",
        "summary.json",
        "report.md",
        "report.html",
        ".lock",
    }
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["settings"]["methods"]["mine"]["tree"] == "4" and run["versions"]["torch"]
    assert str(tmp_path) not in (tmp_path / "out" / "report.md").read_text()

    records = (tmp_path / "out" / "records.jsonl").read_bytes()
    (tmp_path / "out" / "records.jsonl").write_bytes(records[:-30])
    again = amphista(*command)
    assert again.returncode == 0 and json.loads(again.stdout.splitlines()[-1])["methods"]["mine"]["identical"] == 1.0
    assert "| mine" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.jsonl", "--methods", "none"], "neither a question file nor one of the named sets"),
        (["{q}", "--methods", "none,"], "separated by commas"),
        (["{q}", "--methods", "none,x=no/such/folder"], "method x: "),
        (["{q}", "--methods", "none,medusa"], "method medusa: "),
        (["{q}", "--methods", "none", "--repeats", 0], "--repeats is 0"),
        (["{q}", "--methods", "none", "--limit", 0], "--limit is 0"),
        (["{bad}", "--methods", "none"], "line 1: a question without turns"),
        (["{q}", "--methods", "none", "--temperature", -1], "temperature is -1"),
    ],
)
def test_bad_input_is_one_sentence(target_folder, questions, tmp_path, arguments, said):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question_id": 1}\n')
    filled = [str(a).format(q=questions, bad=bad) for a in arguments]
    result = amphista("evaluate", *filled, "--target", target_folder, "--out", tmp_path / "out")
    assert result.returncode == 2 and said in result.stderr.replace("\n", " "), result.stderr
    assert not (tmp_path / "out").exists()


def test_failed_answers_end_with_a_sentence_and_a_code_of_their_own(target_folder, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "Short?"}) + "\n" + json.dumps({"prompt": "x" * 2000}) + "\n")
    result = amphista("evaluate", path, "--target", target_folder, "--methods", "none,lookup", "--max-new-tokens", 4,
                      "--out", tmp_path / "out", "--json")  # fmt: skip
    assert result.returncode == 1 and "2 of 4 answers failed" in result.stderr, result.stderr
    found = json.loads(result.stdout)["methods"]["lookup"]
    assert (found["failed"], found["num_answers"], found["compared"], found["identical"]) == (1, 1, 1, 1.0)


def test_latency_of_a_target(target_folder, drafter_folder, tmp_path):
    command = ["dev", "latency", "--target", target_folder, "--drafters", f"mine={drafter_folder}", "--nodes", "1,4",
               "--contexts", "6", "--rounds", "1", "--out", tmp_path / "out", "--json"]  # fmt: skip
    result = amphista(*command)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert [row["nodes"] for row in found["verify"]] == [1, 4]
    assert found["projection"][0]["drafter"] == "mine" and "projected" in result.stderr
    assert found == json.loads((tmp_path / "out" / "latency.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--nodes", "1,two"], "whole numbers"),
    ],
)
def test_latency_refuses_what_it_cannot_measure(arguments, match, tmp_path):
    result = amphista("dev", "latency", *arguments, "--out", tmp_path / "out")
    assert result.returncode == 2 and match in " ".join(result.stderr.split()), result.stderr
    assert not (tmp_path / "out").exists()
