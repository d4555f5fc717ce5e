"""From records to numbers, one definition each (ALGORITHM section 8): per method, over all answers and by task.

Rates are sums of tokens over sums of seconds. A speedup is the ratio of two rates over the answers that both methods
gave without failing, so both sides answer the same questions; intervals are those of bootstrap.py. On the loop-free
prefix of an answer, prefill and the steps that reach its end are what is timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amphista.engine.loops import loop_free_length, steps_within
from amphista.evaluation.bootstrap import Interval, add_to, bootstrap
from amphista.evaluation.methods import HF, NONE
from amphista.evaluation.records import Record

PLAIN = (NONE, HF)
ALL = "all"


@dataclass(frozen=True)
class Counted:
    """One answer's tokens and seconds under one way of counting."""

    tokens: float
    seconds: float


def whole(record: Record) -> Counted:
    """All tokens, prefill included."""
    return Counted(len(record.token_ids), record.seconds)


def decode_only(record: Record) -> Counted:
    """Tokens behind the prefill's, without the prefill."""
    return Counted(len(record.token_ids) - record.prefill_tokens, record.decode_seconds)


def loop_free(record: Record) -> Counted:
    """Tokens before the answer begins to loop, with the prefill and the steps they took."""
    length, steps = _loop_free_steps(record)
    return Counted(length, record.prefill_seconds + sum(record.step_seconds[:steps]))


def _loop_free_steps(record: Record) -> tuple[int, int]:
    length = loop_free_length(record.token_ids)
    return length, steps_within(record.accepted, length, record.prefill_tokens)


@dataclass(frozen=True, kw_only=True)
class Measures:
    """One method over a set of answers. None where there is nothing to count; shares lie between 0 and 1.

    acceptance_by_depth[d]: share of decode steps that accepted more than d draft tokens. identical: share of compared
    answers with the same tokens as `none`'s, failed ones counted against it. speedup_hf: over stock `generate`, None without it. expected_tau: tau by the drafter's own
    probabilities. mean_tree_nodes: rows per target forward, root included.
    """

    num_answers: int
    failed: int
    num_tokens: int
    num_steps: int
    tau: float | None
    tau_interval: Interval | None
    expected_tau: float | None
    tau_loop_free: float | None
    tokens_per_second: float | None
    decode_tokens_per_second: float | None
    speedup: float | None
    speedup_interval: Interval | None
    decode_speedup: float | None
    decode_speedup_interval: Interval | None
    loop_free_speedup: float | None
    speedup_hf: float | None
    speedup_hf_interval: Interval | None
    identical: float | None
    compared: int
    mean_tree_nodes: float | None
    acceptance_by_depth: list[float]
    phase_seconds: dict[str, float]
    looping_answers: int


def summarise(records: Sequence[Record], methods: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """`{task: {method: measures}}`; the first task, `all`, is every answer."""
    tasks = list(dict.fromkeys(record.task for record in records))
    chosen = {ALL: list(records)} | {task: [r for r in records if r.task == task] for task in tasks if task != ALL}
    return {task: {name: asdict(_measures(name, members)) for name in methods} for task, members in chosen.items()}


def _measures(name: str, records: Sequence[Record]) -> Measures:
    mine = [r for r in records if r.method == name and not r.failed]
    plain = [r for r in records if r.method == NONE and not r.failed]
    stock = [r for r in records if r.method == HF and not r.failed]
    compared = [r for r in records if r.method == name and r.matches is not None]
    steps = Counter(accepted + 1 for r in mine for accepted in r.accepted)
    speedup, interval = speedup_over(mine, plain, whole)
    decode_speedup, decode_interval = speedup_over(mine, plain, decode_only)
    hf_speedup, hf_interval = speedup_over(mine, stock, whole)
    return Measures(
        num_answers=len(mine),
        failed=sum(r.method == name and r.failed for r in records),
        num_tokens=sum(len(r.token_ids) for r in mine),
        num_steps=sum(steps.values()),
        tau=_tau(name, mine, loop_free=False),
        tau_interval=per_step(mine, _decoded)[1],
        expected_tau=_expected_tau(mine),
        tau_loop_free=_tau(name, mine, loop_free=True),
        tokens_per_second=_rate(mine, whole),
        decode_tokens_per_second=_rate(mine, decode_only),
        speedup=speedup,
        speedup_interval=interval,
        decode_speedup=decode_speedup,
        decode_speedup_interval=decode_interval,
        loop_free_speedup=speedup_over(mine, plain, loop_free)[0],
        speedup_hf=hf_speedup,
        speedup_hf_interval=hf_interval,
        identical=1.0 if name == NONE and mine else _mean([r.matches for r in compared]),
        compared=len(compared),
        mean_tree_nodes=per_step(mine, lambda r: sum(r.tree_nodes))[0],
        acceptance_by_depth=_acceptance_by_depth(steps),
        phase_seconds=_phases(mine),
        looping_answers=sum(loop_free_length(r.token_ids) < len(r.token_ids) for r in mine),
    )


def _decoded(record: Record) -> int:
    """Tokens behind the prefill's."""
    return len(record.token_ids) - record.prefill_tokens


def per_step(records: Sequence[Record], amount: Callable[[Record], float]) -> tuple[float | None, Interval | None]:
    """Something summed over answers, by their decode steps."""
    sums: dict[str, list[float]] = {}
    for record in records:
        add_to(sums, record.id, [amount(record), len(record.accepted)])
    return bootstrap(sums, over=(0,), under=(1,))


def _tau(name: str, records: Sequence[Record], *, loop_free: bool) -> float | None:
    """Tokens committed per target decode forward; a plain method that never stepped is 1 by definition."""
    tokens = steps = 0
    for record in records:
        length, taken = _loop_free_steps(record) if loop_free else (len(record.token_ids), len(record.accepted))
        tokens += max(0, length - record.prefill_tokens)
        steps += taken
    if steps:
        return tokens / steps
    return 1.0 if records and name in PLAIN else None


def _expected_tau(records: Sequence[Record]) -> float | None:
    expected = [value for record in records for value in record.expected]
    return 1 + sum(expected) / len(expected) if expected else None


def _rate(records: Sequence[Record], counting: Any) -> float | None:
    counted = [counting(record) for record in records]
    seconds = sum(c.seconds for c in counted)
    return sum(c.tokens for c in counted) / seconds if counted and seconds > 0 else None


def _mean(values: Sequence[Any]) -> float | None:
    return sum(values) / len(values) if values else None


def _acceptance_by_depth(steps: Counter[int]) -> list[float]:
    total = sum(steps.values())
    deepest = max(steps, default=1) - 1
    return [sum(n for count, n in steps.items() if count > depth) / total for depth in range(1, deepest + 1)]


def _phases(records: Sequence[Record]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.phase_seconds)  # adds floats as it adds counts
    return {phase: float(seconds) for phase, seconds in total.items()}


def speedup_over(
    ours: Sequence[Record], theirs: Sequence[Record], counting: Any
) -> tuple[float | None, Interval | None]:
    """Ratio of rates over the answers both gave, and its 95 % bootstrap interval over questions."""
    baseline = {record.group: record for record in theirs}
    pairs = [(record, baseline[record.group]) for record in ours if record.group in baseline]
    sums: dict[str, list[float]] = {}
    for a, b in pairs:
        mine, base = counting(a), counting(b)
        add_to(sums, a.id, (mine.tokens, mine.seconds, base.tokens, base.seconds))
    if any(sum(column) <= 0 for column in zip(*sums.values(), strict=True)):
        return None, None
    return bootstrap(sums, over=(0, 3), under=(1, 2))


def contract(summary: dict[str, dict[str, dict[str, Any]]], num_questions: int) -> dict[str, Any]:
    """What `amphista evaluate --json` prints."""
    keys = (
        "num_answers",
        "failed",
        "identical",
        "compared",
        "tau",
        "tau_loop_free",
        "tokens_per_second",
        "decode_tokens_per_second",
        "speedup",
        "speedup_interval",
        "decode_speedup",
        "speedup_hf",
        "num_tokens",
    )
    return {
        "questions": num_questions,
        "methods": {name: {key: measures[key] for key in keys} for name, measures in summary[ALL].items()},
    }
