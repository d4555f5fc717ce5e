"""Candidates: what a drafter offers a tree, per depth the best tokens and their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Candidates:
    """`tokens[k][r]` at depth k + 1 with natural log-probability `log_probs[k][r]`.

    Ranks are in descending probability and a head never offers a token twice.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]

    @property
    def num_heads(self) -> int:
        return len(self.tokens)
