"""What heads say, ranked: tensors on the device, and what a tree grows from.

Shapes: B sequences, k heads, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from amphista.tree.candidates import Candidates, ConditionalRanks


class Ranked(NamedTuple):
    """The best tokens of k heads as tensors, on the device: ids and log-probabilities [B, k, R], and for heads that
    know paths, of each of their tokens the best below it, `ConditionalRanks` as tensors [B, k - 1, parents, children].
    """

    token_ids: Tensor
    log_probs: Tensor
    ranks_below: Tensor | None = None
    log_probs_below: Tensor | None = None

    def candidates(self, max_depths: Sequence[int]) -> list[Candidates]:
        """The same for trees to grow from, of as many heads as each sequence has use for."""
        parts = [part.numpy(force=True) for part in self if part is not None]
        return candidates_of([part.tolist() for part in parts[:2]] + parts[2:], max_depths)


def candidates_of(parts: Sequence[Any], max_depths: Sequence[int]) -> list[Candidates]:
    """The same of the parts as lists, and as arrays those of paths, only where heads know them."""
    found = []
    for depth, (tokens, log_probs, *below) in zip(max_depths, zip(*parts, strict=True), strict=True):
        paths = ConditionalRanks(*(part[: depth - 1] for part in below)) if below and depth > 1 else None
        found.append(Candidates(tokens[:depth], log_probs[:depth], below=paths))
    return found
