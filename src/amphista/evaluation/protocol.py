"""Spec-Bench's own counting (arXiv 2401.07851, its evaluation scripts), beside ours, so that both can be compared.

As its scripts count: warm-up is the first question, all turns, three times. The time of a question is that of its
whole turns, prefill included. The speed of a question is its tokens per second, the speed of a task the plain mean over
its questions, and a speedup the ratio of two such means. Mean accepted tokens is the flat mean, over all steps of all
questions, of what a step adds, the target's own token included. The two sides are counted differently: a method by its
own loop, tokens behind the end of the answer included; the baseline, stock `generate`, by tokenising its text again,
less one. Our trees are never deeper than the tokens still allowed, so only tokens behind an end token can be extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amphista.evaluation.questions import Question
from amphista.evaluation.records import Record
from amphista.target.text import Text

WARM_UP_TOKENS = 8
SPEC_BENCH_WARM_UPS = 3


def warm_up_plan(protocol: str, question: Question) -> tuple[int, int, int]:
    """Turns, times and tokens of the unmeasured warm-up."""
    if protocol == "spec-bench":
        return len(question.turns), SPEC_BENCH_WARM_UPS, 2**31
    return 1, 1, WARM_UP_TOKENS


def recount(text: Text, answer: str) -> int:
    """What Spec-Bench counts for its baseline: tokens of the decoded text, less one for a start token."""
    return len(text.encode(answer)) - 1


@dataclass(frozen=True)
class SpecBenchCounts:
    """One method in Spec-Bench's counting; speedup is None without the baseline's answers."""

    tokens_per_second: float | None
    speedup: float | None
    mean_accepted_tokens: float | None


def spec_bench_counts(
    records: Sequence[Record], baseline: Sequence[Record], *, is_baseline_kind: bool
) -> dict[str, Any]:
    """Counts of one method over records without failures; `baseline` are those of stock `generate`."""
    ours = _mean_speed(records, recounted=is_baseline_kind)
    theirs = _mean_speed(baseline, recounted=True)
    growth = [step for record in records for step in _growth(record)]
    return asdict(
        SpecBenchCounts(ours, ours / theirs if ours and theirs else None, sum(growth) / len(growth) if growth else None)
    )


def _growth(record: Record) -> list[int]:
    """Tokens each decode step adds; the last one with what it chose behind the end."""
    steps = [count + 1 for count in record.accepted]
    if steps:
        steps[-1] += record.num_dropped
    return steps


def _mean_speed(records: Sequence[Record], *, recounted: bool) -> float | None:
    """Plain mean over questions of tokens per second."""
    tokens: dict[tuple[str, int], int] = {}
    seconds: dict[tuple[str, int], float] = {}
    for record in records:
        key = (record.id, record.repeat)
        count = (
            record.recount if recounted and record.recount is not None else len(record.token_ids) + record.num_dropped
        )
        tokens[key] = tokens.get(key, 0) + count
        seconds[key] = seconds.get(key, 0.0) + record.seconds
    speeds = [tokens[key] / seconds[key] for key in tokens if seconds[key] > 0]
    return sum(speeds) / len(speeds) if speeds else None
