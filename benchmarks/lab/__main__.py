"""The performance lab: what stands between the measured speed and what the machine allows. Run from the repository.

python -m benchmarks.lab latency --out runs/bench-speed/latency --python --memory-dtypes float32,int8
python -m benchmarks.lab page runs/bench-speed
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amphista.cli.progress import StepProgress
from amphista.cli.standard import told
from amphista.drafter.checkpoint import load_proposer
from amphista.errors import AmphistaError
from amphista.evaluation.latency import LatencyConfig, measure_latency, write_latency
from amphista.evaluation.methods import timed_drafters
from amphista.llm import LLM
from amphista.target import DEFAULT_TARGET
from amphista.target.loading import load_target
from amphista.target.target import Target
from benchmarks.lab.limits import ForwardWork, measure_limits
from benchmarks.lab.memory import MemoryJob, check_peaks_are_told, decodable, loadable_types, peak_memory
from benchmarks.lab.page import latency_goals, write_page
from benchmarks.lab.step_profile import profile_steps


def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    asked = _parser().parse_args(arguments)
    try:
        with told():
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
    latency.add_argument("--nodes", type=_numbers, default=(1, 2, 4, 8, 16))
    latency.add_argument("--contexts", type=_numbers, default=(128, 512, 1024, 2048, 4096))
    latency.add_argument("--rounds", type=int, default=7)
    latency.add_argument("--memory-dtypes", type=lambda text: text.split(","), help="types to measure peak memory in")
    page = commands.add_parser("page", help="one page of all runs in a folder, goals first")
    page.set_defaults(run=lambda asked: write_page(asked.folder))
    page.add_argument("folder", type=Path)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _latency(asked: argparse.Namespace) -> str:
    """`amphista dev latency` and what it does not tell, in one record; returns the lines that have goals."""
    if asked.memory_dtypes:
        check_peaks_are_told()  # better before minutes of measuring
    config = LatencyConfig(nodes=asked.nodes, contexts=asked.contexts, rounds=asked.rounds)
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


def add_limits(record: dict[str, Any], target: Target) -> None:
    """What the machine allows, and beside each forward the least milliseconds it could take."""
    work, limits = ForwardWork.of(target), measure_limits(target)
    record["limits"] = asdict(limits)
    for row in record["verify"]:
        row["least_ms"] = work.least_ms(limits, batch=row["batch"], context=row["context"], nodes=row["nodes"])


def _profile(name: str, target: Target) -> dict[str, Any]:
    return profile_steps(LLM(target, load_proposer(name, target.spec, target.shared, target.fingerprint)), name)


if __name__ == "__main__":
    main()
