"""The pace of training before and after a change: two source trees, the same rows and steps, in turn, in one run.

    git archive COMMIT | tar x -C /tmp/before
    python benchmarks/lab/training_pace.py --before /tmp/before --recipe recipes/smollm2-135m-amphista-third.toml \
        --init amphista --data answers.jsonl --out benchmarks/MACHINE/training-pace/amphista.json

Each tree trains in a process of its own, of one thread. First it fills its store of hidden states with all rows, which
is timed apart; then each turn begins anew with batches in another order, so with shapes that were not met before, as in
a run of hours. The processes take turns, so both see the same machine. Reported are medians over turns: positions a
second by the clock, and by the processor's time of the process, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amphista.train.trainer import Trainer

WORKER = "--worker"


def main() -> None:
    """Start both workers, let them take turns, write the record."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        trees = {"before": options.before, "after": options.after}
        workers = {name: _start(tree, Path(folder) / name, options) for name, tree in trees.items()}
        filled = {name: _turn(worker) for name, worker in workers.items()}
        turns = [{name: _turn(worker) for name, worker in workers.items()} for _ in range(options.turns)]
        for worker in workers.values():
            worker.communicate("end\n")
    record: dict[str, Any] = {name: filled[name] | _summary([turn[name] for turn in turns]) for name in trees}
    ratios = {
        kind: [turn["after"][kind] / turn["before"][kind] for turn in turns]
        for kind in ("per_second", "per_cpu_second")
    }
    record["ratio"] = {kind: {"median": statistics.median(r), "all": r} for kind, r in ratios.items()}
    record["settings"] = {
        "recipe": options.recipe.name, "settings": options.settings, "steps": options.steps, "turns": options.turns,
        "load": os.getloadavg(),
    }  # fmt: skip
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    read = [round(filled[name]["read_per_second"]) for name in trees]
    sys.stdout.write(f"hidden states of tokens a second: {read[0]} before, {read[1]} after\n")
    for kind, ratio in record["ratio"].items():
        before, after = (round(record[name][kind]) for name in ("before", "after"))
        sys.stdout.write(f"positions {kind}: {before} before, {after} after; median ratio {ratio['median']:.2f}\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="source tree of the commit to compare with")
    parser.add_argument("--after", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="rows as JSON lines, which both trees read")
    parser.add_argument("--init", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


def _start(tree: Path, folder: Path, options: argparse.Namespace) -> subprocess.Popen[str]:
    arguments = {
        "recipe": str(options.recipe), "data": str(options.data), "init": options.init, "dtype": options.dtype,
        "settings": options.settings, "steps": options.steps, "out": str(folder / "run"),
    }  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve() / "src"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, WORKER, json.dumps(arguments)]
    return subprocess.Popen(words, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _turn(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended with {worker.wait()}")
    record: dict[str, Any] = json.loads(line)
    return record


def _summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    found = {kind: statistics.median(turn[kind] for turn in turns) for kind in ("per_second", "per_cpu_second")}
    return {**found, "losses": turns[0]["losses"], "version": turns[0]["version"], "turns": turns}


class Marks:
    """When each step ended: by the clock, by the processor's time, behind how many positions, with which loss."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.ends: list[tuple[float, float, int, str]] = []

    def __call__(self, step: int, of: int, line: str) -> None:
        assert self.trainer is not None
        positions = self.trainer.progress.positions
        self.ends.append((time.perf_counter(), time.process_time(), positions, line.split()[1]))

    def record(self) -> dict[str, Any]:
        """Of all steps but the first, which warms up."""
        (start, start_cpu, before, _), (end, end_cpu, behind, _) = self.ends[0], self.ends[-1]
        return {
            "positions": behind - before,
            "per_second": (behind - before) / (end - start),
            "per_cpu_second": (behind - before) / (end_cpu - start_cpu),
            "losses": [loss for *_, loss in self.ends],
        }


def work(arguments: dict[str, Any]) -> None:
    """Fill the store; then answer each line of standard input with some steps: a new trainer, the same weights."""
    import torch

    from amphista import provenance
    from amphista.config import apply_overrides, build, read_recipe
    from amphista.target import DEFAULT_TARGET
    from amphista.target.loading import load_target
    from amphista.train.config import TrainConfig
    from amphista.train.dataset import epoch_batches
    from amphista.train.trainer import Trainer

    torch.set_num_threads(1)
    values = apply_overrides(read_recipe(Path(arguments["recipe"])), arguments["settings"])
    values |= {"init": arguments["init"], "log_every": 1, "save_every": 10**6, "validate_every": 0}
    values["data"] = {**values.get("data", {}), "files": [arguments["data"]], "store": True}
    target = load_target(DEFAULT_TARGET, device="cpu", dtype=arguments["dtype"])
    for seed, line in enumerate(sys.stdin):
        if line != "go\n":
            break
        marks = Marks()
        config = build(TrainConfig, values | {"seed": seed})
        marks.trainer = Trainer(target, config, Path(arguments["out"]), lambda line: None, marks)
        if seed:
            marks.trainer.run(stop_after=arguments["steps"] + 1)
            sys.stdout.write(json.dumps({**marks.record(), "version": provenance.git_state()}) + "\n")
        else:
            rows, size = marks.trainer.parts.data.rows, config.optimizer.batch_size
            start = time.perf_counter()
            for batch in epoch_batches(rows, size, seed, 0):
                marks.trainer.parts.hidden.get(batch)
            pace = sum(len(row.token_ids) for row in rows) / (time.perf_counter() - start)
            sys.stdout.write(json.dumps({"read_per_second": pace}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    work(json.loads(sys.argv[2])) if sys.argv[1:2] == [WORKER] else main()
