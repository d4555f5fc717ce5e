"""kill -9 in mid-epoch and in mid-checkpoint: what goes on equals what never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.system.test_cli import amphista

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    chance = random.Random(1)
    lines = []
    for number in range(40):
        prompt, answer = ([chance.randrange(250) for _ in range(length)] for length in (4, chance.randrange(3, 20)))
        lines.append({"id": f"p{number}", "prompt_ids": prompt, "answer_ids": answer})
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def losses_of(out):
    """Whole lines only: the last one may be cut."""
    if not (out / "log.jsonl").is_file():
        return []
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    return [record["loss"] for record in map(json.loads, (x for x in lines if x.endswith("\n"))) if "loss" in record]


def test_kill_minus_nine_in_mid_epoch_loses_nothing(target_folder, rows_file, tmp_path):
    """Two kills at moments of no one's choosing, between two saves."""
    settings = ["model.num_heads=3", "model.draft_vocab=120", "data.validation_share=0.2", "optimizer.batch_size=3",
                "optimizer.epochs=18", "log_every=1", "save_every=25"]  # fmt: skip
    command = ["train", "--target", target_folder, "--data", rows_file, *(w for s in settings for w in ("--set", s))]
    assert amphista(*command, "--out", tmp_path / "whole").returncode == 0
    out, num_steps = tmp_path / "killed", len(losses_of(tmp_path / "whole"))
    for wanted in (30, 90):
        words = [sys.executable, "-m", "amphista", *map(str, command), "--out", str(out)]
        process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while len(losses_of(out)) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"it ended before the kill: {error.decode()}"
        assert wanted <= len(losses_of(out)) < num_steps
    assert "resuming at step" in error.decode()
    resumed = amphista(*command, "--out", out)
    assert resumed.returncode == 0 and "resuming at step" in resumed.stderr
    assert losses_of(out) == losses_of(tmp_path / "whole") and num_steps > 150
    for part in ("state", "best", "last"):
        expected, found = (load_file(run / part / "model.safetensors") for run in (tmp_path / "whole", out))
        assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_kill_minus_nine_at_any_file_operation_loses_nothing(target_folder, rows_file, tmp_path):
    """Every rename and each tenth of the other operations of a run, and half a file: state, best, last and log."""
    script = Path(__file__).with_name("kill_training.py")
    words = [sys.executable, script, target_folder, rows_file, tmp_path, "10"]
    done = subprocess.run(list(map(str, words)), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [r for r in records if not (r["killed"] and r["resumed"] and r["is_equal"]) or r["left_over"]]
    assert not failed, f"{failed}\n{done.stderr[-3000:]}"
    places = {record["where"] for record in records}
    assert {"os.rename .new-state", "os.rename state", "half of optimizer.bin"} <= places
    assert {record["had_state"] for record in records} == {True, False} and len(records) > 10
