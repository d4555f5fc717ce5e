"""`amphista calibrate` as users meet it: held-out rows only, another draft vocabulary, decoded beside simulated tau."""

from __future__ import annotations

import json

import pytest

from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.drafter.checkpoint import load_drafter, read_checkpoint, save_drafter
from amphista.engine.decoder import decode
from amphista.engine.params import SamplingParams
from amphista.llm import LLM
from amphista.target.loading import load_target
from amphista.train.dataset import HiddenStates
from amphista.train.losses import LossConfig
from amphista.train.prompts import read_rows
from amphista.train.validation import validate
from tests.system.test_cli import amphista
from tests.tiny import shaken

RECIPE = {"recipe": {"data": {"files": ["answers.jsonl"], "validation_share": 0.4, "seed": 0}}}


@pytest.fixture(scope="module")
def target(target_folder):
    return load_target(str(target_folder))


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory):
    drafter = shaken(Amphista(AmphistaConfig(num_heads=3), target.spec, target.shared), scale=0.05)
    drafter.match_scale(5.0)
    folder = tmp_path_factory.mktemp("drafter") / "mine"
    save_drafter(drafter, folder, target.fingerprint, card="# mine\n", training=RECIPE)
    return folder


@pytest.fixture(scope="module")
def data(target, tmp_path_factory):
    """Answers the target really gives, half of them sampled."""
    engine = LLM(target).engine
    lines = []
    for i in range(24):
        prompt = [(31 * i + j) % 250 for j in range(4)]
        params = SamplingParams(max_new_tokens=24, temperature=0.7 * (i % 2), seed=1000 + i)
        answer = decode(engine, prompt, params).output_ids
        lines.append({"id": f"p{i}", "prompt_ids": prompt, "answer_ids": answer, "temperature": params.temperature})
    path = tmp_path_factory.mktemp("data") / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def calibrated(*arguments):
    result = amphista("dev", "calibrate", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_only_held_out_rows_of_the_training_data_count(target, target_folder, folder, data, tmp_path):
    arguments = [folder, "--target", target_folder, "--data", data]
    record = calibrated(*arguments, "--out", tmp_path / "out")
    assert record["held_out"] and 0 < record["rows"] < 24
    assert calibrated(*arguments, "--out", tmp_path / "all", "--all-rows")["rows"] == 24
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint.calibration is not None and len(checkpoint.calibration.accuracy) == 3
    assert checkpoint.training["calibration"]["rows"] == record["rows"]


def test_greedy_tau_decoded_is_the_simulated_one(target, folder, data):
    rows = read_rows([data], None, target.eos_ids, vocab_size=target.spec.vocab_size, max_len=512)
    greedy = [row for row in rows if row.temperature == 0]
    drafter = load_drafter(str(folder), target.spec, target.shared, target.fingerprint)
    hidden = HiddenStates(target, greedy, None)
    simulated = validate(drafter, greedy, hidden, LossConfig(), tree_sizes=[8]).tau[8]
    engine = LLM(target, drafter, tree=8).engine
    sequences = []
    for row in greedy:
        start = row.answers.index(1)
        sequences.append(decode(engine, row.token_ids[:start], SamplingParams(max_new_tokens=len(row.answers) - start)))
        assert sequences[-1].output_ids == row.token_ids[start:]
    tokens = sum(len(sequence.output_ids) - 1 for sequence in sequences)
    decoded = tokens / sum(sequence.stats.num_steps for sequence in sequences)
    assert decoded > 1 and decoded == pytest.approx(simulated, rel=0.05)


def test_another_draft_vocabulary(target_folder, folder, data, tmp_path):
    out = ["--out", tmp_path / "out", "--draft-vocab", "60"]
    record = calibrated(folder, "--target", target_folder, "--data", data, *out)
    assert record["draft_vocab"] == 60 and 0 < record["coverage"] < 1
    assert read_checkpoint(tmp_path / "out").config.draft_vocab == 60
    command = ["generate", "hi", "--target", target_folder, "--drafter", tmp_path / "out", "--max-new-tokens", "4"]
    assert amphista(*command).returncode == 0


@pytest.mark.parametrize(("arguments", "match"), [(["--nodes", "1"], "--nodes is 1")])
def test_bad_settings(target_folder, folder, data, tmp_path, arguments, match):
    command = [
        "dev",
        "calibrate",
        folder,
        "--target",
        target_folder,
        "--data",
        data,
        "--out",
        tmp_path / "out",
        *arguments,
    ]
    result = amphista(*command)
    assert result.returncode == 2 and match in result.stderr and not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_replaced(target_folder, folder, data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = amphista("dev", "calibrate", folder, "--target", target_folder, "--data", data, "--out", tmp_path)
    assert result.returncode == 2 and "choose another --out" in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"
