"""Proposer: what may propose tokens. Heads, lookup, both side by side, or neither, which is plain decoding.

What they propose decides nothing but how soon an answer is there.
"""

from __future__ import annotations

import os

from amphista.drafter.base import Drafter
from amphista.drafter.lookup import LOOKUP, Lookup
from amphista.tree.candidates import NgramDraft

NONE = "none"
SELDOM = 4  # tokens from one look to the next, where looking hardly pays


def parts_of(name: str) -> tuple[str, bool]:
    """(the heads, 'none' where there are none; whether with lookup) of a drafter's name as users give it."""
    use_lookup = name == LOOKUP or (name.endswith(f"+{LOOKUP}") and not os.path.exists(os.path.expanduser(name)))
    return (name.removesuffix(LOOKUP).removesuffix("+") or NONE) if use_lookup else name or NONE, use_lookup


class Proposer:
    """`heads`: a drafter with weights, or None. use_lookup: whether sequences are looked up in themselves."""

    def __init__(self, heads: Drafter | None = None, *, use_lookup: bool = False) -> None:
        self.heads, self.use_lookup = heads, use_lookup

    @classmethod
    def of(cls, drafter: Proposer | Drafter | None) -> Proposer:
        """A drafter alone; what is a proposer already, as it is."""
        return drafter if isinstance(drafter, Proposer) else cls(drafter)

    @property
    def name(self) -> str:
        """`none`, `lookup`, a drafter's name, or both: `amphista+lookup`."""
        parts = [*([self.heads.name] if self.heads else []), *([LOOKUP] if self.use_lookup else [])]
        return "+".join(parts) or NONE

    @property
    def num_heads(self) -> int:
        return 0 if self.heads is None else self.heads.num_heads

    @property
    def proposes_nothing(self) -> bool:
        """Whether this is plain decoding."""
        return self.heads is None and not self.use_lookup

    def new_lookup(self) -> Lookup | None:
        """For one sequence."""
        return Lookup() if self.use_lookup else None

    def ngrams(
        self, lookup: Lookup | None, token_ids: list[int], max_depth: int, *, seldom: bool = False
    ) -> NgramDraft | None:
        """What the sequence itself suggests after `token_ids`, the pending one included; costs no pass over anything.

        The ids grow at their end between two calls. seldom: nothing until SELDOM have come since the last look.
        """
        if lookup is None or (seldom and len(token_ids) - len(lookup.index) < SELDOM):
            return None
        return lookup.propose(token_ids, max_depth)
