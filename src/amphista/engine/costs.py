"""The costs that `--tree auto` weighs, measured once for each combination of what they depend on.

That is processor, threads and accelerator, versions, the code of the forward, the target, its type, path and device,
the batch; for drafting also the drafter's dimensions. Drafting is kept in forwards of one row, so that the two stay
comparable when they were measured on different days. What other programs have disturbed is not kept.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from amphista import provenance
from amphista.drafter.base import Drafter
from amphista.drafter.proposer import Proposer
from amphista.engine.cost_cache import load_or_measure
from amphista.engine.timing import NOISY, ForwardSeconds, draft_ratio, verify_seconds
from amphista.native.crew import CREW
from amphista.target.target import Target
from amphista.tree.tune import NOTHING_PAYS, Costs

logger = logging.getLogger("amphista")

FORMAT = 4
TIMED_CODE = ("cache", "drafter", "engine", "kernels", "native", "target", "tree")


@dataclass(frozen=True)
class Tuned:
    """What was measured, and the costs made from it."""

    forward: ForwardSeconds
    costs: Costs


def costs_for(target: Target, proposer: Proposer) -> Costs:
    """What steps cost with this target and drafter on this machine: kept from before, or measured now (some seconds).

    Plain decoding needs none.
    """
    return NOTHING_PAYS if proposer.proposes_nothing else tune(target, proposer).costs


def tune(target: Target, proposer: Proposer, *, refresh: bool = False) -> Tuned:
    """The costs with what they were made from; refresh: measured anew, whatever is kept."""
    key, heads = target_key(target), proposer.heads
    record = load_or_measure({"what": "verify", **key}, lambda: _measure_verify(target), _is_curve, refresh=refresh)
    by_rows = {int(size): seconds for size, seconds in record["seconds"].items()}
    forward = ForwardSeconds(by_rows, *(record[name] for name in ("context", "sequence", "cached_row", "spread")))
    asked = {"ratio": 0.0, "further": 0.0, "further_round": 0.0}
    if heads is not None and heads.cost_key is not None:
        key = {"what": "draft", **key, "drafter": heads.cost_key}
        asked = load_or_measure(key, lambda: _measure_draft(target, heads), _is_ratio, refresh=refresh)
    target.give_back_graphs()
    costs = replace(
        Costs.measured(by_rows, by_rows[1] * asked["ratio"], in_steps=target.is_static),
        drafted=by_rows[1] * asked["further"],
        further_round=by_rows[1] * asked["further_round"],
        sequence=forward.sequence,
        cached_row=forward.cached_row,
        context=forward.context,
    )
    return Tuned(forward, costs)


def target_key(target: Target) -> dict[str, Any]:
    """All that the seconds of a forward depend on."""
    versions = provenance.versions()
    return {
        "format": FORMAT,
        "machine": provenance.machine(),
        "versions": {name: versions[name] for name in ("torch", "transformers")},
        "code": _code_sha256(),
        "target": asdict(target.fingerprint) | asdict(target.spec),
        "dtype": str(target.dtype),
        "path": target.path,
        "device": str(target.device),
        "batch": 1,
    }


def _measure_verify(target: Target) -> dict[str, Any]:
    logger.info("measuring what a forward costs here (some seconds, once; `amphista dev tune` shows it)")
    with CREW.whole():  # fewer threads would be steady, and slow
        record = asdict(verify_seconds(target))
    _say_if_noisy("forwards", record["spread"])
    return {"seconds": {str(size): value for size, value in record.pop("by_rows").items()}, **record}


def _measure_draft(target: Target, drafter: Drafter) -> dict[str, Any]:
    with CREW.whole():
        asking = draft_ratio(target, drafter)
    _say_if_noisy("drafting", asking.spread)
    return asking._asdict()


def _say_if_noisy(what: str, spread: float) -> None:
    if spread > NOISY:
        logger.warning(
            f"other programs disturbed the measurement of {what}: it is not kept, the next start measures again"
        )


def _is_curve(record: dict[str, Any]) -> bool:
    seconds = record["seconds"]
    sizes = [int(size) for size in seconds]
    is_curve = sizes[:1] == [1] and sizes == sorted(sizes) and all(map(_is_positive, seconds.values()))
    has_rates = type(record["context"]) is int and _is_cost(record["sequence"]) and _is_cost(record["cached_row"])
    return is_curve and has_rates and _is_quiet(record)


def _is_ratio(record: dict[str, Any]) -> bool:
    further = [record["further"], record["further_round"]]
    return _is_positive(record["ratio"]) and all(map(_is_cost, further)) and _is_quiet(record)


def _is_quiet(record: dict[str, Any]) -> bool:
    return _is_positive(record["spread"]) and bool(record["spread"] <= NOISY)


def _is_positive(value: Any) -> bool:
    return type(value) is float and 0 < value < float("inf")


def _is_cost(value: Any) -> bool:
    return value == 0.0 or _is_positive(value)


def _code_sha256() -> str:
    """Of the code that is timed: another version of it measures anew."""
    digest = hashlib.sha256()
    for folder in TIMED_CODE:
        for file in sorted((Path(__file__).parents[1] / folder).glob("*.[pch]*")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
