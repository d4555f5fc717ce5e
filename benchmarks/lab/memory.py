"""How much memory decoding takes: the peak of a process of its own, beside what it cannot do without.

    overhead = (peak - after imports) / (weights + KV cache + drafter)

The process loads the target and the drafter, reads `context` tokens, decodes up to `new_tokens` more and tells the
highest resident size the kernel saw (VmHWM of /proc/self/status); on an accelerator the highest allocation there. A
fresh process, because a peak never falls and freed memory is not always given back.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from amphista.drafter.base import Drafter
from amphista.drafter.checkpoint import DRAFTERS, shipped_for
from amphista.drafter.lookup import LOOKUP
from amphista.drafter.scoring import ScoringDrafter
from amphista.errors import AmphistaError, ConfigError, NativeError
from amphista.native.build import load
from amphista.target.loading import INT8, import_code
from amphista.target.target import Target

logger = logging.getLogger("amphista")

STATUS = Path("/proc/self/status")
RESULT = "amphista-memory: "


@dataclass(frozen=True, kw_only=True)
class MemoryJob:
    """What the process does: arguments of `load`, and how much it reads and writes."""

    target: str
    drafter: str
    settings: dict[str, Any]
    context: int = 256
    new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.context < 1 or self.new_tokens < 1:
            raise ConfigError(f"context {self.context}, new_tokens {self.new_tokens}: expected at least 1 of each")


def peak_memory(job: MemoryJob) -> dict[str, Any]:
    """Run the job in a process of its own; what it took, in bytes, and the overhead.

    raises ConfigError where the kernel does not tell a process's peak; AmphistaError with its words if it fails.
    """
    check_peaks_are_told()
    command = [sys.executable, "-m", "benchmarks.lab.memory", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AmphistaError(f"measuring memory with drafter {job.drafter} ended with {done.returncode}: {last}")
    measured: dict[str, Any] = json.loads(found[-1].removeprefix(RESULT))
    needed = measured["weights_bytes"] + measured["cache_bytes"] + measured["drafter_bytes"]
    return {**asdict(job), **measured, "overhead": (measured["peak_bytes"] - measured["imports_bytes"]) / needed}


def check_peaks_are_told() -> None:
    """Raise ConfigError where the kernel does not tell a process's peak: better before minutes of measuring."""
    if not STATUS.exists():
        raise ConfigError("peak memory is read from /proc/self/status, which this system does not have")


def loadable_types(names: Sequence[str]) -> list[str]:
    """The types that a target can have on this machine; says which are left out."""
    types = list(names)
    if INT8 in types:
        try:
            load()
        except NativeError as error:
            logger.info("memory in int8 is not measured: it needs the C step: %s", error)
            types.remove(INT8)
    return types


def decodable(drafters: str, target: Target) -> list[str]:
    """`none` and those of NAME[=DRAFTER],... that can be loaded for this target: random weights are timed, not used."""
    parts = [part.strip().partition("=") for part in drafters.split(",")]
    names = [place or name for name, _, place in parts if place or _is_there(name, target)]
    return ["none", *(name for name in names if name != "none")]


def _is_there(name: str, target: Target) -> bool:
    """Whether a drafter of this name, with or without lookup, needs no weights or is shipped with them."""
    heads = name.removesuffix("+" + LOOKUP)
    return heads in ("none", LOOKUP) or (heads in DRAFTERS and shipped_for(heads, target.fingerprint) is not None)


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise ConfigError(f"{STATUS} has no {field}")


def _measure(job: MemoryJob) -> dict[str, int]:
    """In the process of its own."""
    import amphista.evaluation.methods  # noqa: F401
    from amphista.engine.params import SamplingParams
    from amphista.engine.stream import finish
    from amphista.llm import load

    import_code(job.target)  # `transformers` imports a family's code when it loads one: an import like any other
    imports = resident_bytes("VmRSS")
    llm = load(job.target, job.drafter, **job.settings)
    prompt = torch.randint(llm.target.spec.vocab_size, (job.context,), generator=torch.Generator().manual_seed(0))
    params = SamplingParams(max_new_tokens=job.new_tokens)
    stream = llm.stream_ids(prompt.tolist(), params)
    answer = finish(stream)
    peak = resident_bytes("VmHWM")
    if llm.target.device.type == "cuda":
        imports, peak = 0, torch.cuda.max_memory_allocated(llm.target.device)
    return {
        "tokens": answer.stats.num_prompt_tokens + answer.stats.num_tokens,
        "imports_bytes": imports,
        "peak_bytes": peak,
        "weights_bytes": llm.target.num_weight_bytes,
        "cache_bytes": stream.request.rows.cache.num_bytes,
        "drafter_bytes": _drafter_bytes(llm.drafter.heads),
    }


def _drafter_bytes(drafter: Drafter | None) -> int:
    if not isinstance(drafter, ScoringDrafter):
        return 0
    head = 0 if drafter.draft_ids is None else drafter.draft_vocab * drafter.spec.hidden_size  # gathered rows
    return (drafter.num_weights + head) * drafter.dtype.itemsize


if __name__ == "__main__":
    sys.stdout.write(RESULT + json.dumps(_measure(MemoryJob(**json.loads(sys.argv[1])))) + "\n")
