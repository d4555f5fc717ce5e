"""`amphista distill` as users meet it: answers, a real kill -9 and the resume, a launcher's shares, training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from amphista.train.distilled import read_answered
from tests.system.test_cli import amphista
from tests.talkative import asked, talkative_model
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved target that ends its answers, and prompts."""
    made = tmp_path_factory.mktemp("distill")
    talkative_model(end_bias=0.0).save_pretrained(made / "target")
    byte_tokenizer().save_pretrained(made / "target")
    (made / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked(400, turns=3)))
    return made


def arguments(folder, out, *more):
    return ["distill", "--prompts", folder / "prompts.jsonl", "--target", folder / "target", "--out", out,
            "--max-new-tokens", 30, "--set", "max_len=400", "--batch-size", 8,
            "--dtype", "float32", *more]  # fmt: skip


def run(folder, out, *more):
    result = amphista(*arguments(folder, out, *more), "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_answers_and_what_training_makes_of_them(folder, tmp_path):
    out = tmp_path / "answers"
    summary = run(folder, out, "--limit", 60)
    assert summary["conversations"] == 60 and 15 <= summary["sampled"] <= 45
    assert summary["answers"] == sum(summary["finish"].values()) > 60
    assert summary["decoded_tokens"] >= summary["answer_tokens"] > 0 and summary["tokens_per_second"] > 0
    assert len(read_answered(out)) == 60 and summary["left_out"]["lines"] == 0
    trained = amphista(
        "train", "--data", out, "--target", folder / "target", "--out", tmp_path / "run", "--set", "model.num_heads=2",
        "--set", "model.draft_vocab=120", "--set", "data.validation_share=0.2", "--set", "optimizer.max_steps=6",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    record = json.loads((tmp_path / "run" / "last" / "config.json").read_text())["training"]["data"]
    assert record["rows"] + record["validation_rows"] == summary["rows"]
    assert record["answer_tokens"] + record["validation_answer_tokens"] == summary["answer_tokens"]


def test_kill_minus_nine_loses_nothing_and_doubles_nothing(folder, tmp_path):
    out = tmp_path / "answers"
    command = [sys.executable, "-m", "amphista", *map(str, arguments(folder, out))]
    kept = {}
    for wanted in (25, 120):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while (
            not (out.is_dir() and len(read_answered(out)) >= wanted)
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"it ended before the kill: {error.decode()}"
        answered = {one.id: one for one in read_answered(out)}
        assert wanted <= len(answered) < 400
        assert all(answered[name] == one for name, one in kept.items()), "a finished conversation was lost or changed"
        kept = answered
    summary = run(folder, out)
    resumed = {one.id: one for one in read_answered(out)}
    assert len(resumed) == summary["conversations"] == 400
    assert all(resumed[name] == one for name, one in kept.items())
    assert len((out / "rows-0.jsonl").read_text().splitlines()) == 400
    run(folder, tmp_path / "whole")
    whole = {one.id: one for one in read_answered(tmp_path / "whole")}
    # Equal in exact arithmetic (a law, in float64); here float32 kernels may settle a near-tie by the batch's make-up.
    assert sum(resumed[name] == one for name, one in whole.items()) >= 396


def test_a_launcher_s_environment_shares_the_work(folder, tmp_path, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(folder, tmp_path / "by-rank", "--limit", 9)["conversations"] == 5 - int(rank)
    monkeypatch.delenv("RANK")
    for shard in ("0/2", "1/2"):
        run(folder, tmp_path / "by-option", "--limit", 9, "--shard", shard)
    assert {one.id for one in read_answered(tmp_path / "by-rank")} == {f"q{n}" for n in range(9)}
    assert read_answered(tmp_path / "by-option") == read_answered(tmp_path / "by-rank")


BAD = {
    "no prompts": (["--out", "OUT"], "no prompts"),
    "no such file": (["--out", "OUT", "--prompts", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "shard of words": (["--out", "OUT", "--prompts", "PROMPTS", "--shard", "first"], "expected i/n"),
    "shard beyond the last": (["--out", "OUT", "--prompts", "PROMPTS", "--shard", "2/2"], "expected i/n"),
    "share above 1": (["--out", "OUT", "--prompts", "PROMPTS", "--sampled-share", "1.5"], "sampled_share is 1.5"),
    "sampled at 0": (["--out", "OUT", "--prompts", "PROMPTS", "--temperature", "0"], "temperature is 0"),
    "batch of 0": (["--out", "OUT", "--prompts", "PROMPTS", "--batch-size", "0"], "must be at least 1"),
    "unknown setting": (["--out", "OUT", "--set", "batchsize=3"], "did you mean 'batch_size'"),
    "answers too long": (["--out", "OUT", "--set", "max_len=100"], "expected more than max_new_tokens"),
    "limit of 0": (["--out", "OUT", "--prompts", "PROMPTS", "--limit", "0"], "limit is 0"),
    "seed below 0": (["--out", "OUT", "--prompts", "PROMPTS", "--seed", "-1"], "seed is -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(name, folder, tmp_path):
    words, message = BAD[name]
    places = {"PROMPTS": str(folder / "prompts.jsonl"), "OUT": str(tmp_path / "out")}
    result = amphista("distill", "--target", folder / "target", *[places.get(word, word) for word in words])
    assert result.returncode == 2 and message in result.stderr.strip().splitlines()[-1], result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_a_recipe_is_read_and_another_run_s_folder_refused(folder, tmp_path):
    (tmp_path / "r.toml").write_text(f'prompts = ["{folder / "prompts.jsonl"}"]\nlimit = 3\nseed = 8\nmax_len = 400\n')
    common = ["--recipe", tmp_path / "r.toml", "--target", folder / "target", "--out", tmp_path / "out"]
    assert amphista("distill", *common, "--max-new-tokens", 5).returncode == 0
    assert len(read_answered(tmp_path / "out")) == 3
    refused = amphista("distill", *common, "--max-new-tokens", 5, "--seed", 9)
    assert refused.returncode == 2 and "seed is 9, there it is 8" in refused.stderr
