"""Training in two processes is training in one: the same batches, the same losses, the same weights up to rounding.

Stated tolerance: losses within 1e-5 of each other, relative, at every step (found: 3e-7); each weight tensor after 18
steps within 1e-3, in norms (found: 2e-4 at most: Adam divides a small gradient by itself, and so makes its rounding
large); sharded ones as far as the bfloat16 of OUT/last shows. All in float32 on CPU, over gloo.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from amphista.config import build
from amphista.errors import ConfigError
from amphista.target.loading import load_target
from amphista.train.config import TrainConfig
from amphista.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("train_worker.py")
BATCH_SIZE = 5


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """Rows of which one is left over for the last batch of an epoch: a process has nothing to do there."""
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for number in range(57):
        prompt, answer = ([chance.randrange(250) for _ in range(length)] for length in (4, chance.randrange(3, 30)))
        lines.append({"id": f"p{number}", "prompt_ids": prompt, "answer_ids": answer})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(rows_file, **changes):
    values = {
        "model": {"num_heads": 3, "draft_vocab": 150},
        "data": {"files": [str(rows_file)], "validation_share": 0.24},
        "optimizer": {"batch_size": BATCH_SIZE, "max_steps": 18, "epochs": 3, "warmup_steps": 2, "learning_rate": 3e-3},
        "save_every": 5,
        "log_every": 1,
    }
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    return values


def launched(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    words = [sys.executable, "-m", *map(str, command)]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=300)  # seconds; it takes 5 on an idle machine
    except BaseException:
        process.terminate()  # the launcher ends its processes on this signal, and could not on a kill
        process.wait(60)
        raise
    assert process.returncode == 0, said[-4000:]
    return said


def torchrun(target_folder, values, out, stops, *kind):
    config = out.with_suffix(".json")
    config.write_text(json.dumps(values))
    return launched("torch.distributed.run", "--nproc-per-node", 2, "--standalone", WORKER, target_folder, config,
                    out, stops, *kind)  # fmt: skip


def alone(target_folder, values, out):
    trainer = Trainer(load_target(str(target_folder), device="cpu"), build(TrainConfig, values), out, lambda line: None)
    sizes = [len(rows) for rows in trainer._batches()]
    assert sizes.count(1) >= 1, "no process is ever without a row: the law would be vacuous"
    trainer.run()
    return out


def assert_same_run(one, other, num_steps=18):
    expected, found = (
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, other)
    )
    assert [record["step"] for record in found] == [*range(1, num_steps + 1), num_steps]
    for ours, theirs in zip(expected, found, strict=True):
        assert ours["positions"] == theirs["positions"] and ours["learning_rate"] == theirs["learning_rate"]
        if "loss" in ours:
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
            assert theirs["head_loss"] == pytest.approx(ours["head_loss"], rel=1e-5)
    assert len({record["loss"] for record in expected[:-1]}) == num_steps
    whole = (other / "state" / "model.safetensors").is_file()
    part, tolerance = ("state", 1e-3) if whole else ("last", 1e-2)
    ours, theirs = (load_file(run / part / "model.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        difference = torch.linalg.vector_norm(theirs[name].double() - weight.double())
        assert difference <= tolerance * torch.linalg.vector_norm(weight.double()), name


def test_accelerate_launch_gives_the_loss_curve_of_one_process(target_folder, rows_file, tmp_path):
    """The command of the documentation, its shares done in two parts each."""
    one = alone(target_folder, settings(rows_file), tmp_path / "one")
    values = settings(rows_file, optimizer={"accumulate": 2}, tensorboard=True)
    changes = [f"{name}={value}" for name, value in flat(values)]
    said = launched(
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision",
        "no", "--dynamo_backend", "no", "--main_process_port", 0, "-m", "amphista", "train", "--target", target_folder,
        "--data", rows_file, "--out", tmp_path / "two", *[word for change in changes for word in ("--set", change)],
    )  # fmt: skip
    assert len(list((tmp_path / "two" / "state").glob("random_states_*"))) == 2, "there was one process"
    for line in ("amphista with", "step 18/18", "the drafter is in"):
        assert said.count(line) == 1, "the main process says it, and no other"
    assert_same_run(one, tmp_path / "two")
    assert len(list((tmp_path / "two" / "tensorboard").glob("events.*"))) == 1


def flat(values, name=""):
    """Nested settings as (a.b, TOML value); files are given otherwise."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{name}{key}.")
        elif key != "files":
            yield f"{name}{key}", json.dumps(value)


OWN_HEADS = {"drafter": "medusa", "model": {"lm_head": "own"}, "loss": {"accept_until_fail": True}}


def test_two_processes_stop_and_go_on_and_one_finishes(target_folder, rows_file, tmp_path):
    """DDP on own LM heads, of which some have nothing to aim at, with a loss whose weight is known only afterwards.

    How many processes share a batch is no setting of a run.
    """
    values = settings(rows_file, **OWN_HEADS, data={"store": True})
    one = alone(target_folder, values, tmp_path / "one" / "run")
    two = tmp_path / "two" / "run"
    two.parent.mkdir()
    said = torchrun(target_folder, values, two, "7,7")
    assert said.count("resuming at step 5 of 18") == 1 and said.count("hidden states of 57 rows") == 2
    assert (two / "state" / "random_states_1.pkl").is_file() and '"step": 10' in (
        two / "state/progress.json"
    ).read_text()
    assert_same_run(one, alone(target_folder, values, two))


def test_fsdp2_gives_the_loss_curve_of_one_process_and_goes_on(target_folder, rows_file, tmp_path):
    values = settings(rows_file)
    one = alone(target_folder, values, tmp_path / "one")
    values["optimizer"]["accumulate"] = 2
    said = torchrun(target_folder, values, tmp_path / "two", "7,0", "fsdp")
    assert said.count("resuming at step 5 of 18") == 1
    assert_same_run(one, tmp_path / "two")
    with pytest.raises(ConfigError, match="sharded is not set, there it is True"):
        alone(target_folder, values, tmp_path / "two")
