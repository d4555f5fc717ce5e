"""The performance lab: what stands between the measured speed and what the machine allows. Run from the repository.

python -m benchmarks.lab latency --out runs/bench-speed/latency --python --memory-dtypes float32,int8
python -m benchmarks.lab latency --shape llama-13b --layers 4 --out runs/latency-13b
python -m benchmarks.lab page runs/bench-speed
python -m benchmarks.lab ablate recipes/ablations.toml --data answers.jsonl.gz --out runs/ablations
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amphista.cli.progress import StepProgress
from amphista.cli.standard import logging_to_stderr
from amphista.drafter.checkpoint import DRAFTERS, load_proposer
from amphista.errors import AmphistaError
from amphista.evaluation.latency import LatencyConfig, latency_tables, measure_latency, write_latency
from amphista.evaluation.methods import timed_drafters
from amphista.files import write_file
from amphista.llm import LLM
from amphista.target import DEFAULT_TARGET
from amphista.target.loading import load_target
from amphista.target.target import Target
from benchmarks.lab.ablations import Ablations, Plan, rows_of, table_lines
from benchmarks.lab.limits import ForwardWork, measure_limits
from benchmarks.lab.memory import MemoryJob, check_peaks_are_told, decodable, loadable_types, peak_memory
from benchmarks.lab.page import latency_goals, write_page
from benchmarks.lab.shapes import SHAPES, measure_shape
from benchmarks.lab.step_profile import profile_steps


def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    asked = _parser().parse_args(arguments)
    try:
        with logging_to_stderr():
            print(asked.run(asked))
    except AmphistaError as error:
        print(f"benchmarks.lab: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab")
    commands = parser.add_subparsers(required=True)
    latency = commands.add_parser("latency", help="forwards against the machine's limits, Python, memory")
    latency.set_defaults(run=_latency)
    latency.add_argument("--out", type=Path, required=True)
    latency.add_argument("--target", default=DEFAULT_TARGET)
    latency.add_argument("--dtype")
    latency.add_argument("--drafters", default="amphista,medusa,amphista+lookup")
    latency.add_argument("--shape", help=f"random weights instead of a target: {', '.join(SHAPES)}")
    latency.add_argument("--layers", type=int, help="with --shape: measure so many layers and scale their cost up")
    latency.add_argument("--draft-vocab", type=int, help="with --shape: tokens that the drafters score, default all")
    latency.add_argument("--nodes", type=_numbers, default=(1, 2, 4, 8, 16))
    latency.add_argument("--contexts", type=_numbers, default=(128, 512, 1024, 2048, 4096))
    latency.add_argument("--rounds", type=int, default=7)
    latency.add_argument("--memory-dtypes", type=lambda text: text.split(","), help="types to measure peak memory in")
    page = commands.add_parser("page", help="one page of all runs in a folder, goals first")
    page.set_defaults(run=lambda asked: write_page(asked.folder))
    page.add_argument("folder", type=Path)
    ablate = commands.add_parser("ablate", help="all training runs of a plan, what is missing first run, then a table")
    ablate.set_defaults(run=_ablate)
    ablate.add_argument("plan", type=Path, help="TOML file with [base], [runs.NAME] and seeds")
    ablate.add_argument("--data", type=Path, action="append", required=True, help="as for `amphista train`; repeatable")
    ablate.add_argument("--out", type=Path, required=True, help="the same command again goes on from here")
    ablate.add_argument("--only", type=lambda text: text.split(","), default=[], help="names of runs")
    ablate.add_argument("--target", default=DEFAULT_TARGET)
    ablate.add_argument("--device")
    ablate.add_argument("--dtype", help="type of the target's weights")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _latency(asked: argparse.Namespace) -> str:
    """`amphista dev latency` and what it does not tell, in one record; returns the lines that have goals."""
    if asked.memory_dtypes:
        check_peaks_are_told()  # better before minutes of measuring
    config = LatencyConfig(nodes=asked.nodes, contexts=asked.contexts, rounds=asked.rounds)
    if asked.shape:
        return _latency_of_shape(asked, config)
    target = load_target(asked.target, dtype=asked.dtype)
    with StepProgress() as progress:
        record = measure_latency(target, config, timed_drafters(asked.drafters, target), progress.step)
    add_limits(record, target)
    names = decodable(asked.drafters, target)
    record["python"] = [_profile(name, target) for name in names]
    jobs = [
        MemoryJob(target=asked.target, drafter=name, settings={"dtype": dtype})
        for dtype in loadable_types(asked.memory_dtypes or [])
        for name in names
    ]
    record["memory"] = [peak_memory(job) for job in jobs]
    write_latency(asked.out, record)
    return "\n".join(" ".join(row[1:]) for row in latency_goals(asked.out.name, record))


def _latency_of_shape(asked: argparse.Namespace, config: LatencyConfig) -> str:
    """Forwards and drafts of random weights; returns the tables."""
    kinds = [name for name in asked.drafters.split(",") if name in DRAFTERS]
    with StepProgress() as progress:
        _, record = measure_shape(
            asked.shape, asked.layers, config, kinds, asked.draft_vocab, progress.step, dtype=asked.dtype, fast=True
        )
    write_latency(asked.out, record)
    return latency_tables(record)


def _ablate(asked: argparse.Namespace) -> str:
    """Train every variant of a plan on the same data and steps; returns the table, tau side by side."""
    plan = Plan.read(asked.plan)
    with StepProgress() as progress:
        target = load_target(asked.target, device=asked.device, dtype=asked.dtype)
        ablations = Ablations(target, plan, asked.data, asked.out, progress.line, progress.step)
        rows = rows_of(ablations.run(asked.only))
    add_drafting(rows, ablations.drafters(), target)
    table = "\n".join(table_lines(rows)) + "\n"
    write_file(asked.out / "table.md", table)
    return table


def add_drafting(rows: list[dict[str, Any]], folders: dict[str, Path], target: Target) -> None:
    """What a draft of each costs here, all timed in one run."""
    drafters = timed_drafters(",".join(f"{name}={folder}" for name, folder in folders.items()), target)
    record = measure_latency(target, LatencyConfig(nodes=(1, 16), rounds=15), drafters)
    milliseconds = {row["drafter"]: row["ms"] for row in record["draft"] if row["what"] == "draft"}
    for row in rows:
        row["draft_ms"] = milliseconds[row["run"]]


def add_limits(record: dict[str, Any], target: Target) -> None:
    """What the machine allows, and beside each forward the least milliseconds it could take."""
    work, limits = ForwardWork.of(target), measure_limits(target)
    record["limits"] = asdict(limits)
    for row in record["verify"]:
        row["least_ms"] = work.least_ms(limits, batch=1, context=row["context"], nodes=row["nodes"])


def _profile(name: str, target: Target) -> dict[str, Any]:
    return profile_steps(LLM(target, load_proposer(name, target.spec, target.shared, target.fingerprint)), name)


if __name__ == "__main__":
    main()
