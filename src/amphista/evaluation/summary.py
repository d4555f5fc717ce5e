"""The summary of a run: everything its report shows, in one JSON file made from the records.

{"run": settings and environment, "measures": {task: {method: Measures}}, "divergences", "failures",
 "samples": answers with their accepted tokens marked, "notes": sentences a reader must know}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amphista.errors import DataError
from amphista.evaluation.methods import NONE
from amphista.evaluation.metrics import summarise
from amphista.evaluation.records import Record
from amphista.target.text import IncrementalText, Text

RUN, RECORDS, SUMMARY = "run.json", "records.jsonl", "summary.json"
NUM_SAMPLES = 3
OWN, ACCEPTED = 0, 1


def build_summary(run: dict[str, Any], records: Sequence[Record], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers, divergences and failures; raises DataError where records and settings do not belong together."""
    methods = list(run["settings"]["methods"])
    unknown = sorted({record.method for record in records} - set(methods))
    if unknown:
        raise DataError(f"the records name the method {unknown[0]!r}, which the run's settings do not")
    return {
        "run": run,
        "measures": summarise(records, methods),
        "divergences": [_place(r) | (r.divergence or {}) for r in records if r.matches is False and not r.failed],
        "failures": [_place(r) | {"error": r.error} for r in records if r.failed],
        "samples": samples,
        "notes": _notes(run, records),
    }


def _place(record: Record) -> dict[str, Any]:
    return {"method": record.method, "id": record.id, "task": record.task, "turn": record.turn, "repeat": record.repeat}


def _notes(run: dict[str, Any], records: Sequence[Record]) -> list[str]:
    """What changes how the numbers should be read."""
    notes = []
    for resumed in run.get("resumed", []):
        changed = [key for key in ("git", "versions", "machine") if resumed.get(key) != run.get(key)]
        what = f"; since then other {' and '.join(changed)}" if changed else ", in the same environment"
        notes.append(f"The run was broken off after {resumed['after']} records and resumed{what}.")
    failed = sum(record.failed for record in records)
    if failed:
        notes.append(
            f"{failed} of {len(records)} answers failed. Where none gave one, they count as not the same; they are in "
            "no speed and no tau."
        )
    if run["settings"]["params"]["temperature"] > 0:
        notes.append("Stock sampling draws its own noise: its answers are not compared with those of `none`.")
    return notes


def take_samples(records: Sequence[Record], methods: Sequence[str], text: Text) -> list[dict[str, Any]]:
    """A few answers of the method that drafts best, one a task, token by token: text, and whether accepted."""
    drafted = [r for r in records if not r.failed and any(r.accepted) and r.repeat == 0 and r.turn == 0]
    totals = {name: sum(sum(r.accepted) for r in drafted if r.method == name) for name in methods if name != NONE}
    if not drafted:
        return []
    best = max(totals, key=lambda name: totals[name])
    by_task: dict[str, Record] = {}
    for record in drafted:
        if record.method == best:
            by_task.setdefault(record.task, record)
    return [
        {"id": r.id, "task": r.task, "method": r.method, "tau": _sample_tau(r), "tokens": _marked(r, text)}
        for r in list(by_task.values())[:NUM_SAMPLES]
    ]


def _sample_tau(record: Record) -> float:
    return (len(record.token_ids) - record.prefill_tokens) / len(record.accepted)


def _marked(record: Record, text: Text) -> list[list[Any]]:
    """[text, accepted?] by token; bytes of one character come out with its last token."""
    kinds = [OWN] * record.prefill_tokens
    for count in record.accepted:
        kinds += [ACCEPTED] * count + [OWN]
    incremental = IncrementalText(text)
    pieces = [[incremental.push(token), kind] for token, kind in zip(record.token_ids, kinds, strict=False)]
    return [*pieces, [incremental.finish(), OWN]]
