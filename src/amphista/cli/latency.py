"""amphista dev latency: how long a forward takes over tree size, batch and context, and how long drafting takes.

amphista dev latency --out runs/latency
amphista dev latency --shape llama-13b --layers 2 --tau 16=2.5,64=3.1 --out runs/latency-13b
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from amphista.cli import options
from amphista.target import DEFAULT_TARGET

if TYPE_CHECKING:
    from amphista.evaluation.latency import LatencyConfig
    from amphista.target.target import Target

Drafters = Annotated[
    str,
    typer.Option(
        metavar="NAME[=DRAFTER],...",
        help="Drafters to time: amphista, medusa (random weights where none is shipped), name=PATH, or none.",
    ),
]
Memory = Annotated[
    bool, typer.Option("--memory", help="Also the peak memory of decoding, each drafter in its own process.")
]
MemoryDtypes = Annotated[
    str | None,
    typer.Option(metavar="DTYPE,...", help="With --memory: in these types instead of --dtype, one after the other."),
]
Python = Annotated[
    bool, typer.Option("--python", help="Also how much of a decode step lies outside tensor operations.")
]


def latency(
    out: Annotated[Path, typer.Option(help="Folder for latency.json, latency.md and latency.svg.")],
    nodes: Annotated[str, typer.Option(help="Tree sizes, root included.")] = "1,2,4,8,16,32,64",
    contexts: Annotated[str, typer.Option(help="Rows in the cache before the forward.")] = "256",
    batches: Annotated[str, typer.Option(help="Sequences per forward; drafting is timed for one.")] = "1",
    rounds: Annotated[int, typer.Option(help="Timed repetitions, after one that is not timed.")] = 7,
    drafters: Drafters = "amphista,medusa",
    draft_vocab: Annotated[
        int | None, typer.Option(help="Tokens that drafters with random weights score. Default: all.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="llama-7b, llama-13b, llama-33b or llama-70b with random weights, instead of --target."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="With --shape: measure that many layers and scale their cost up.")
    ] = None,
    tau: Annotated[
        str | None,
        typer.Option(metavar="NODES=TAU,...", help="Tokens per forward to assume: adds projected speedups."),
    ] = None,
    memory: Memory = False,
    memory_dtypes: MemoryDtypes = None,
    python: Python = False,
    target: options.Target = DEFAULT_TARGET,
    allow_other_target: options.AllowOtherTarget = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    fast: options.Fast = True,
    json_lines: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object at the end.")] = False,
) -> None:
    """Measure what a forward and a draft cost here, and from which tau on drafting pays."""
    from amphista.evaluation.latency import LatencyConfig
    from amphista.target.loading import load_target
    from amphista.target.shapes import random_target, shape_named

    _check(shape, layers, memory=memory, memory_dtypes=memory_dtypes, python=python)
    config = LatencyConfig(
        nodes=_numbers("--nodes", nodes),
        contexts=_numbers("--contexts", contexts),
        batches=_numbers("--batches", batches),
        rounds=rounds,
        num_layers=None if shape is None else shape_named(shape).num_layers,
        tau=_taus(tau),
    )
    if shape is None:
        loaded = load_target(target, device=device, dtype=dtype, fast=fast)
    else:
        rows = (max(config.batches) + 1) * (max(config.contexts) + max(config.nodes))
        loaded = random_target(shape, num_layers=layers, cache_rows=rows, device=device, dtype=dtype, fast=fast)
    asked = _Asked(drafters, draft_vocab, allow_other_target)
    record = _measure(config, loaded, asked)
    if python:
        record["python"] = _python(loaded, asked)
    if memory:
        settings = {"device": device, "fast": fast, "allow_other_target": allow_other_target}
        types = None if memory_dtypes is None else memory_dtypes.split(",")
        record["memory"] = _memory(target, loaded, asked, settings | {"dtype": dtype}, types)
    _write(record, out, json_lines)


def _check(shape: str | None, layers: int | None, *, memory: bool, memory_dtypes: str | None, python: bool) -> None:
    """Raise ConfigError for options that do not go together, or not on this system."""
    from amphista.errors import ConfigError
    from amphista.evaluation.memory import check_peaks_are_told

    if (memory or python) and shape is not None:
        raise ConfigError("--memory and --python decode with a target that can be loaded: leave out --shape")
    if memory_dtypes is not None and not memory:
        raise ConfigError("--memory-dtypes goes with --memory")
    if layers is not None and shape is None:
        raise ConfigError("--layers goes with --shape: a loaded target is measured whole")
    if memory:
        check_peaks_are_told()


class _Asked(NamedTuple):
    """Which drafters are timed, what random ones score, whether those of other targets may load."""

    drafters: str
    draft_vocab: int | None
    allow_other_target: bool


def _measure(config: LatencyConfig, target: Target, asked: _Asked) -> dict[str, Any]:
    from amphista.cli.progress import StepProgress
    from amphista.evaluation.latency import measure_latency
    from amphista.evaluation.methods import timed_drafters

    loaded = timed_drafters(
        asked.drafters, target, draft_vocab=asked.draft_vocab, allow_other_target=asked.allow_other_target
    )
    with StepProgress() as progress:
        return measure_latency(target, config, loaded, progress.step)


def _memory(
    name: str, target: Target, asked: _Asked, settings: dict[str, Any], types: list[str] | None
) -> list[dict[str, Any]]:
    from amphista.evaluation.memory import MemoryJob, decodable, loadable_types, peak_memory

    each = [settings]
    if types is not None:
        each = [settings | {"dtype": dtype} for dtype in loadable_types(types, settings["device"])]
    jobs = [(drafter, with_type) for with_type in each for drafter in decodable(asked.drafters, target)]
    return [peak_memory(MemoryJob(target=name, drafter=drafter, settings=with_type)) for drafter, with_type in jobs]


def _python(target: Target, asked: _Asked) -> list[dict[str, Any]]:
    from amphista.drafter.checkpoint import load_drafter
    from amphista.evaluation.memory import decodable
    from amphista.evaluation.step_profile import profile_steps
    from amphista.llm import LLM

    rows = []
    for name in decodable(asked.drafters, target):
        drafter = load_drafter(
            name, target.spec, target.shared, target.fingerprint, allow_other_target=asked.allow_other_target
        )
        rows.append(profile_steps(LLM(target, drafter), name))
    return rows


def _write(record: dict[str, Any], out: Path, json_lines: bool) -> None:
    from amphista.evaluation.latency_report import latency_tables, write_latency

    write_latency(out, record)
    print(latency_tables(record), file=sys.stderr if json_lines else sys.stdout)
    print(f"amphista: the record is {out / 'latency.json'}", file=sys.stderr)
    if json_lines:
        print(json.dumps(record))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from amphista.errors import ConfigError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}: expected whole numbers with commas between, as in 1,2,4") from error


def _taus(text: str | None) -> tuple[tuple[int, float], ...]:
    from amphista.errors import ConfigError

    if text is None:
        return ()
    try:
        return tuple((int(nodes), float(value)) for nodes, value in (part.split("=") for part in text.split(",")))
    except ValueError as error:
        raise ConfigError(f"--tau is {text!r}: expected NODES=TAU with commas between, as in 16=2.5,64=3.1") from error
