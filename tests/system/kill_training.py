"""Kill -9 a training run at every one of its file operations in turn, and go on; run as a process of its own.

    python tests/system/kill_training.py TARGET ROWS FOLDER EVERY

Each run is a forked process that gets a real SIGKILL at its n-th change of a file below its OUT (or in the middle of
one), n = 1, 1 + EVERY, ..., and at every rename; another process then goes on. Prints one JSON line for each.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from amphista.target.loading import load_target
from amphista.train.config import DataConfig, OptimizerConfig, TrainConfig
from amphista.train.trainer import Trainer

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def config_for(rows):
    return TrainConfig(
        model={"num_heads": 2, "draft_vocab": 80, "stages": 1},
        data=DataConfig(files=(str(rows),), validation_share=0.3),
        optimizer=OptimizerConfig(batch_size=3, max_steps=4, warmup_steps=1, learning_rate=1e-2),
        save_every=2,
        validate_every=2,
        log_every=1,
    )


def is_change(event, arguments, out):
    if event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
        return False
    if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
        return False
    return str(arguments[0]).startswith(str(out))


def train(target, rows, out, seen=lambda number, event, path: None):
    """In a forked process; `seen` is called before each change. Returns the wait status."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, arguments):
            nonlocal count
            if is_change(event, arguments, out):
                count += 1
                seen(count, event, str(arguments[0]))

        sys.addaudithook(hook)
        try:
            Trainer(target, config_for(rows), out, lambda line: None).run()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def fingerprint(out):
    """Weights of state, best and last, and the log without its times."""
    digest = hashlib.sha256()
    for name in ("state", "best", "last"):
        digest.update((out / name / "model.safetensors").read_bytes())
    for line in (out / "log.jsonl").read_text().splitlines():
        digest.update(json.dumps({**json.loads(line), "seconds": 0}).encode())
    return digest.hexdigest()


def torn_save(written):
    """torch.save that dies with half of the file on disk."""
    save = torch.save

    def torn(value, file, *arguments, **options):
        save(value, file, *arguments, **options)
        if written in str(file):
            whole = Path(file).read_bytes()
            Path(file).write_bytes(whole[: len(whole) // 2])
            kill_self()

    return torn


def main():
    torch.set_num_threads(1)
    target_folder, rows, folder, every = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    target = load_target(target_folder, device="cpu")
    operations = folder / "operations.jsonl"

    def note(number, event, path):
        with open(os.open(operations, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as stream:
            stream.write(json.dumps([number, event, Path(path).name]) + "\n")

    assert train(target, rows, folder / "whole", note) == 0
    expected = fingerprint(folder / "whole")
    for number, event, name in map(json.loads, operations.read_text().splitlines()):
        if number % every != 1 % every and event != "os.rename":
            continue
        out = folder / f"killed-{number}"
        status = train(target, rows, out, lambda at, *_, number=number: at == number and kill_self())
        report(target, rows, out, expected, f"{event} {name}", status)
    for written in ("optimizer.bin",):
        torch.save, kept = torn_save(written), torch.save
        out = folder / f"torn-{written}"
        status = train(target, rows, out)
        torch.save = kept
        report(target, rows, out, expected, f"half of {written}", status)


def report(target, rows, out, expected, where, status):
    """Go on with a killed run and say what came out."""
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    had_state = (out / "state").exists() or (out / ".old-state").exists()
    resumed = train(target, rows, out) == 0
    record = {"where": where, "killed": killed, "had_state": had_state, "resumed": resumed}
    record["is_equal"] = resumed and fingerprint(out) == expected
    record["left_over"] = sorted(
        {path.name for path in out.iterdir()} - {".lock", "best", "last", "log.jsonl", "state"}
    )
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
