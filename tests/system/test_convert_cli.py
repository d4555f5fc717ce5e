"""Convert as users meet it, on a tiny saved target and published heads made here."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard

from tests.system.test_cli import amphista, records
from tests.unit.drafter.test_convert import random_heads, write_pt


@pytest.fixture
def theirs(tmp_path):
    folder = tmp_path / "theirs"
    write_pt(folder, random_heads(dtype=torch.bfloat16), base_model_name_or_path="owner/target")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [
        {
            "id": str(i),
            "prompt_ids": [i, 2, 3],
            "answer_ids": [40 + i, 41, 42, 43, 44, 257],
            "temperature": 0.7 * (i % 2),
        }
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def convert(theirs, target_folder, out, *more):
    return amphista("convert", "medusa", theirs, "--target", target_folder, "--out", out, *more)


def test_converted_calibrated_and_compared(theirs, answers, target_folder, tmp_path):
    ours = tmp_path / "ours"
    result = convert(theirs, target_folder, ours, "--data", answers, "--base-model", "owner/target", "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["num_heads"] == 3 and record["lm_head"] == "own" and set(record["tau"]) == {"greedy", "sampled"}
    assert "3 heads with own LM heads" in result.stderr
    stored = json.loads((ours / "config.json").read_text())
    assert stored["calibration"]["coverage"] == 1.0 and len(stored["calibration"]["greedy"]) == 3
    assert stored["training"]["converted"]["source"] == "theirs"
    card = ModelCard.load(ours / "README.md").data
    assert card.license == "mit" and card.base_model == "owner/target" and card.eval_results

    (compared,) = records("Hello", "--target", target_folder, "--drafter", ours, "--compare", "--max-new-tokens", 24,
                          "--tree", 12)  # fmt: skip
    assert compared["identical"] is True and compared["drafter"] == "medusa"


def test_without_answers_it_works_uncalibrated(theirs, target_folder, tmp_path):
    ours = tmp_path / "ours"
    result = convert(theirs, target_folder, ours, "--license", "apache-2.0")
    assert result.returncode == 0 and "not calibrated" in result.stderr
    assert "names owner/target as its target" in result.stderr
    (record,) = records("Hello", "--target", target_folder, "--drafter", ours, "--max-new-tokens", 8)
    assert record["drafter"] == "medusa"
    card = ModelCard.load(ours / "README.md")
    assert card.data.license == "apache-2.0" and not card.data.eval_results and "Not calibrated" in card.text


def test_nothing_but_a_drafter_is_ever_replaced(theirs, target_folder, tmp_path):
    for out in (theirs, tmp_path):
        before = sorted(path.name for path in out.iterdir())
        result = convert(theirs, target_folder, out)
        assert result.returncode == 2 and "is no drafter of ours: choose another --out" in result.stderr
        assert sorted(path.name for path in out.iterdir()) == before
    assert convert(theirs, target_folder, tmp_path / "ours").returncode == 0
    assert convert(theirs, target_folder, tmp_path / "ours").returncode == 0, "an older conversion is replaced"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eagle", "theirs"], "unknown layout 'eagle': expected medusa, hydra"),
        (["medusa", "./nowhere"], "there is no folder './nowhere'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, message, target_folder, tmp_path):
    result = amphista("convert", *arguments, "--target", target_folder, "--out", tmp_path / "ours")
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "ours").exists()
