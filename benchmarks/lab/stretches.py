"""What decoding costs as an answer grows: steps by the tokens that stood before them, 0 to 128, to 256, to 512, ...

A step belongs to the stretch in which it begins; the prefill to none. `looping`: share of its tokens behind the place
where their answer began to loop; loops are easily drafted, so speeds of stretches that loop say little. Answers that
end early are in fewer stretches: for a comparison let all reach one length (`ignore_eos`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amphista.engine.loops import loop_free_length
from amphista.evaluation.bootstrap import Interval, add_to, bootstrap
from amphista.evaluation.methods import NONE
from amphista.evaluation.records import Record

FIRST_EDGE = 128


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """One method between two places of its answers. speedup: over `none` in this stretch of the same answers."""

    method: str
    start: int
    end: int
    num_answers: int
    num_steps: int
    ms_per_step: float
    tokens_per_second: float
    tau: float
    mean_tree_nodes: float
    speedup: float | None
    speedup_interval: Interval | None
    looping: float


@dataclass
class _Sums:
    """One answer in one stretch."""

    steps: int = 0
    tokens: int = 0
    nodes: int = 0
    looping: int = 0
    seconds: float = 0.0


def stretches(records: Sequence[Record], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Every method's stretches in order; empty unless an answer is long enough for two of them."""
    done = [record for record in records if not record.failed]
    longest = max((len(record.token_ids) for record in done), default=0)
    if longest <= FIRST_EDGE:
        return []
    cut = {(record.method, record.group): by_stretch(record) for record in done}
    plain = {group: sums for (method, group), sums in cut.items() if method == NONE}
    found = []
    for name in methods:
        mine = {group: sums for (method, group), sums in cut.items() if method == name}
        for index, (start, end) in enumerate(edges(longest)):
            pairs = {g: (s[index], plain.get(g, {}).get(index)) for g, s in mine.items() if index in s}
            if pairs:
                found.append(asdict(_stretch(name, start, end, pairs)))
    return found


def edges(longest: int) -> list[tuple[int, int]]:
    """(start, end) of the stretches of answers up to so many tokens."""
    found = [(0, FIRST_EDGE)]
    while found[-1][1] < longest:
        found.append((found[-1][1], 2 * found[-1][1]))
    return found


def by_stretch(record: Record) -> dict[int, _Sums]:
    """Its steps by the number of their stretch."""
    loop_free = loop_free_length(record.token_ids)
    places = edges(len(record.token_ids))
    found: dict[int, _Sums] = {}
    place, index = record.prefill_tokens, 0
    for accepted, nodes, seconds in zip(record.accepted, record.tree_nodes, record.step_seconds, strict=True):
        while place >= places[index][1]:
            index += 1
        sums = found.setdefault(index, _Sums())
        sums.steps += 1
        sums.tokens += accepted + 1
        sums.nodes += nodes
        sums.seconds += seconds
        sums.looping += min(accepted + 1, max(0, place + accepted + 1 - loop_free))
        place += accepted + 1
    return found


def _stretch(name: str, start: int, end: int, pairs: dict[Any, tuple[_Sums, _Sums | None]]) -> Stretch:
    mine = [sums for sums, _ in pairs.values()]
    rows: dict[str, list[float]] = {}
    for (_, question, _), (ours, plain) in pairs.items():
        if plain is not None:
            add_to(rows, question, [ours.tokens, ours.seconds, plain.tokens, plain.seconds])
    speedup, interval = bootstrap(rows, over=(0, 3), under=(1, 2))
    steps, tokens, seconds = (sum(getattr(s, what) for s in mine) for what in ("steps", "tokens", "seconds"))
    return Stretch(
        method=name,
        start=start,
        end=end,
        num_answers=len(mine),
        num_steps=steps,
        ms_per_step=1000 * seconds / steps,
        tokens_per_second=tokens / seconds,
        tau=tokens / steps,
        mean_tree_nodes=sum(s.nodes for s in mine) / steps,
        speedup=speedup,
        speedup_interval=interval,
        looping=sum(s.looping for s in mine) / tokens,
    )
