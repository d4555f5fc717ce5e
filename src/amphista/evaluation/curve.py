"""Decode speedup over tau: one point a question and method, and their means by tau.

No point lies above speedup = tau: a step is never cheaper than a plain one. How far below says what drafting costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amphista.evaluation.bootstrap import add_to
from amphista.evaluation.methods import NONE
from amphista.evaluation.records import Record

BINS = (1.0, 1.25, 1.5, 2.0, 3.0)  # taus from here to the next, the last without end


def points(records: Sequence[Record], methods: Sequence[str]) -> list[dict[str, Any]]:
    """`{method, id, task, tau, speedup}` of every question that a drafting method answered with a step or more."""
    plain = {r.group: r for r in records if r.method == NONE and not r.failed}
    sums: dict[str, dict[str, list[float]]] = {name: {} for name in methods if name != NONE}
    tasks = {record.id: record.task for record in records}
    for record in records:
        if record.method == NONE or record.failed or record.group not in plain:
            continue
        base = plain[record.group]
        row = [len(record.token_ids) - record.prefill_tokens, len(record.accepted), record.decode_seconds]
        add_to(sums[record.method], record.id, [*row, len(base.token_ids) - base.prefill_tokens, base.decode_seconds])
    return [
        {"method": name, "id": question, "task": tasks[question], "tau": tokens / steps, "speedup": speedup}
        for name, rows in sums.items()
        for question, (tokens, steps, seconds, base_tokens, base_seconds) in rows.items()
        if steps and seconds and base_tokens
        for speedup in [(tokens / seconds) / (base_tokens / base_seconds)]
    ]


def bin_of(tau: float) -> int:
    """The number of the bin that holds a tau."""
    return max(0, sum(tau >= edge for edge in BINS) - 1)


def by_tau(found: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float | None]]]:
    """`{method: [(questions, mean speedup), ...]}` over the bins."""
    table: dict[str, list[tuple[int, float | None]]] = {}
    for name in dict.fromkeys(point["method"] for point in found):
        mine = [point for point in found if point["method"] == name]
        cells = [[p["speedup"] for p in mine if bin_of(p["tau"]) == index] for index in range(len(BINS))]
        table[name] = [(len(cell), sum(cell) / len(cell) if cell else None) for cell in cells]
    return table
