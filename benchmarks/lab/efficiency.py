"""Realised and possible: is anything lost between the parts?

    promised speedup = tau / ((T_verify(n) + T_draft) / T_verify(1))

T are the costs that were measured before the run, by which `auto` trees are weighed (`amphista dev tune` shows them).
They are summed step by step, over the tree each step had and whether heads were asked in it; tau is the run's own. The
realised speedup is the decode speedup over `none` on the same answers.

What is lost is told in plain steps: mean seconds of a decode step of `none`. T_verify(1) is one, being measured with
choosing and committing a token as a step does them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from amphista.evaluation.bootstrap import Interval, add_to, bootstrap
from amphista.evaluation.methods import NONE
from amphista.evaluation.records import Record

DRAFTING, FORWARDS = ("draft", "tree"), ("verify", "accept", "commit")


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """One method. `promised_step`, `step` and what is lost in their parts are in plain steps; the three add up to the
    difference of the two. share: realised / promised."""

    promised: float
    realised: float
    realised_interval: Interval
    share: float
    share_interval: Interval
    promised_step: float
    step: float
    lost_drafting: float
    lost_forwards: float
    lost_between: float


def efficiencies(records: Sequence[Record], costs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`{method: Efficiency}` of every method whose costs are known and cover its trees."""
    plain = {r.group: r for r in records if r.method == NONE and not r.failed}
    found: dict[str, dict[str, Any]] = {}
    for name, measured in costs.items():
        pairs = [(r, plain[r.group]) for r in records if r.method == name and not r.failed and r.group in plain]
        made = _efficiency(pairs, measured["verify_ms"], measured["draft_ms"])
        if made is not None:
            found[name] = asdict(made)
    return found


def _efficiency(pairs: Sequence[tuple[Record, Record]], verify: list[float], draft: float) -> Efficiency | None:
    if not pairs or not all(_is_covered(record, len(verify), draft) for record, _ in pairs):
        return None
    sums: dict[str, list[float]] = {}  # tokens, seconds, promised ms: ours, then those of `none`
    for record, plain in pairs:
        promised = sum(verify[nodes - 1] for nodes in record.tree_nodes) + draft * sum(record.drafted)
        row = [_decoded(record), record.decode_seconds, promised]
        row += [_decoded(plain), plain.decode_seconds, verify[0] * len(plain.accepted)]
        add_to(sums, record.id, row)
    promised_speedup, _ = bootstrap(sums, over=(0, 5), under=(2, 3))
    realised, realised_interval = bootstrap(sums, over=(0, 4), under=(1, 3))
    share, share_interval = bootstrap(sums, over=(4, 2), under=(1, 5))
    if promised_speedup is None or realised is None or realised_interval is None or not share or not share_interval:
        return None
    return Efficiency(
        promised=promised_speedup,
        realised=realised,
        realised_interval=realised_interval,
        share=share,
        share_interval=share_interval,
        **_losses(pairs, verify, draft),
    )


def _is_covered(record: Record, max_nodes: int, draft: float) -> bool:
    """Whether the costs of all its steps are known; older records do not tell where heads were asked."""
    told = not draft or len(record.drafted) == len(record.tree_nodes)
    return told and max(record.tree_nodes, default=1) <= max_nodes


def _decoded(record: Record) -> int:
    return len(record.token_ids) - record.prefill_tokens


def _losses(pairs: Sequence[tuple[Record, Record]], verify: list[float], draft: float) -> dict[str, float]:
    """Steps and what is lost in them, in plain steps."""
    ours = [record for record, _ in pairs]
    steps, plain_steps = (sum(len(r.accepted) for r in side) for side in (ours, [plain for _, plain in pairs]))
    unit = steps * sum(plain.decode_seconds for _, plain in pairs) / plain_steps
    forwards = sum(verify[nodes - 1] for r in ours for nodes in r.tree_nodes) / (steps * verify[0])
    drafting = draft * sum(sum(r.drafted) for r in ours) / (steps * verify[0])
    seconds = sum(r.decode_seconds for r in ours)
    in_drafting, in_forwards = (
        sum(r.phase_seconds.get(phase, 0.0) for r in ours for phase in phases) for phases in (DRAFTING, FORWARDS)
    )
    return {
        "promised_step": forwards + drafting,
        "step": seconds / unit,
        "lost_drafting": in_drafting / unit - drafting,
        "lost_forwards": in_forwards / unit - forwards,
        "lost_between": (seconds - in_drafting - in_forwards) / unit,
    }
