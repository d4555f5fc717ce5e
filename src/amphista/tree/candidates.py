"""Candidates: what a drafter offers a tree, per depth the best tokens and their log-probabilities; and a graft."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Graft:
    """One chain of tokens below the root; `log_probs[d]` is that of the token d + 1 deep, those above being right."""

    tokens: list[int]
    log_probs: list[float]


@dataclass(frozen=True)
class Candidates:
    """`tokens[k][r]` at depth k + 1 with natural log-probability `log_probs[k][r]`, and at most one graft.

    Ranks are in descending probability and a head never offers a token twice.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    graft: Graft | None = None

    @property
    def num_heads(self) -> int:
        return len(self.tokens)

    @property
    def max_depth(self) -> int:
        """How deep what is offered reaches."""
        return max(self.num_heads, 0 if self.graft is None else len(self.graft.tokens))
