"""Losslessness, measured: where two answers first differ, and how close the target's own choice was there.

Forwards of n rows and of one row differ in their last bits (different kernels), so a near-tie may flip. A divergence
with a margin around rounding error is that; any other one is a defect.
"""

from __future__ import annotations

from dataclasses import dataclass

from amphista.accept.chooser import Chooser
from amphista.engine.params import SamplingParams
from amphista.engine.step import end_ids
from amphista.target.target import Target


@dataclass(frozen=True)
class Divergence:
    """Index into the output of the first differing token, and the margin of the target's choice there.

    margin: gap of the two best logits when greedy, of the two best noised scores when sampled.
    """

    position: int
    margin: float


def first_divergence(
    target: Target, prompt_ids: list[int], params: SamplingParams, ours: list[int], theirs: list[int]
) -> Divergence | None:
    """None when both outputs are identical."""
    if ours == theirs:
        return None
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    before = [*prompt_ids, *ours[:same]]
    logits = target.prefill(before, target.new_cache()).logits[-1]
    chooser = Chooser(params, prompt_ids, end_ids(target, params))
    chooser.extend(ours[:same])
    return Divergence(same, chooser.margin(logits, len(before)))
