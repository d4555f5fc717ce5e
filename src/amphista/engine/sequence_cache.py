"""SequenceCache: what is cached of one sequence, for target and drafter; it outlives a request, and may pass on.

Row i of the target is made of tokens 0..i, row i of the drafter of token i + 1, too. The drafter's are made when it is
first asked, which may be never: until then hidden states wait in `unfed`, and are then given to it in one go.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amphista.cache.static import sent
from amphista.drafter.base import Ask, Drafter, DrafterState
from amphista.target.target import Target

MAX_UNFED, MAX_PIECES = 2048, 256
SPARE = 8  # rows that nobody reads and that are kept with others
MANY = 32  # rows that are fed before heads are asked, rather than by asking


class Unfed(NamedTuple):
    """Rows that wait for the drafter: hidden states, more perhaps than the tokens that followed; what probes below the
    last gave.

    `end`: how many rows wait up to here, those before included; it is asked several times a step.
    """

    hidden: Tensor
    next_ids: list[int]
    probed: Tensor | None
    end: int


class SequenceCache:
    """The caches of one sequence, and the tokens they are made of: the sequence's own list, which may be longer."""

    def __init__(self, target: Target, heads: Drafter | None, token_ids: list[int]) -> None:
        self._target, self._heads, self.token_ids = target, heads, token_ids
        self.cache = target.new_cache()
        self.cache.first_capacity += len(token_ids)
        self.draft_state = DrafterState() if heads is None else heads.start()
        self.draft_state.target_cache = self.cache
        self.unfed: list[Unfed] = []

    @property
    def num_rows(self) -> int:
        """Rows of these tokens that the target has and the drafter, too, or that wait for it."""
        num_rows = min(self.cache.num_committed, len(self.token_ids))
        return num_rows if self._heads is None else min(num_rows, self.draft_state.num_rows + self.num_unfed)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        waiting = sum(piece.hidden.nbytes for piece in self.unfed)
        return self.cache.num_bytes + self.draft_state.num_bytes + waiting

    @property
    def num_unfed(self) -> int:
        """Rows that wait for the drafter."""
        return self.unfed[-1].end if self.unfed else 0

    def empty(self, token_ids: list[int]) -> SequenceCache:
        """None, for a sequence of these tokens."""
        return SequenceCache(self._target, self._heads, token_ids)

    @property
    def is_probed(self) -> bool:
        """Of a drafter with probes: whether they were read below the last row."""
        return (self.unfed[-1].probed if self.unfed else self.draft_state.features) is not None

    def defer(self, hidden: Tensor, path: list[int], next_ids: list[int], probed: Tensor | None = None) -> None:
        """Keep the hidden states of a committed path for the drafter, with the tokens that followed each node; they do
        not pile up without end. probed: what probes below its last node gave."""
        if self._heads is not None:
            end = self.num_unfed + len(next_ids)
            if path[-1] > len(path) - 1:
                states = hidden.index_select(0, sent(path, hidden.device))
            elif self._target.is_static or len(hidden) > len(path) + SPARE:
                states = hidden[: len(path)].clone()
            else:  # as it is: nobody writes over it, and behind a forward any view takes long
                states = hidden
            self.unfed.append(Unfed(states, next_ids, probed, end))
            if self.num_unfed > MAX_UNFED:
                self.feed()
            elif len(self.unfed) > MAX_PIECES:
                self.unfed[:] = [self._joined()]

    def _joined(self) -> Unfed:
        if len(self.unfed) == 1:
            return self.unfed[0]
        next_ids = [token for piece in self.unfed for token in piece.next_ids]
        hidden = torch.cat([piece.hidden[: len(piece.next_ids)] for piece in self.unfed])
        return self.unfed[-1]._replace(hidden=hidden, next_ids=next_ids)

    def ask(self, max_depth: int) -> Ask:
        """What the drafter is asked, every row it has not read going with it. Row j is made of h_j and x_{j+1}."""
        if not self.unfed:
            return Ask(self.draft_state, max_depth)
        num_fed = self.cache.num_committed - self.num_unfed
        if self._heads is not None and self.draft_state.num_rows > num_fed:  # fed, and broken off before that was noted
            self._heads.trim(self.draft_state, num_fed)
        return Ask(self.draft_state, max_depth, *self._joined()[:3])

    def catch_up(self) -> None:
        """Give the drafter a prompt, or what came while it rested: no part of what asking it costs."""
        if self.num_unfed > MANY:
            self.feed()

    def feed(self) -> None:
        """Give the drafter every row it has not read."""
        if self._heads is not None and self.unfed:
            self._heads.commit_all([self.ask(0)])
            self.note_fed()

    def note_fed(self) -> None:
        """Last: a feeding that is broken off is done again."""
        self.unfed.clear()

    def keep(self, num_rows: int) -> None:
        """Keep the first rows alone, at most `num_rows`, of the target and of the drafter."""
        self.feed()
        num_rows = min(num_rows, self.num_rows)
        self.cache.trim(num_rows)
        if self._heads is not None:
            self._heads.trim(self.draft_state, num_rows)

    def copied(self, num_rows: int, token_ids: list[int]) -> SequenceCache:
        """The first rows in storage of their own, for another sequence."""
        self.feed()
        copy = self.empty(token_ids)
        self._target.copy_rows(self.cache, copy.cache, num_rows)
        if self._heads is not None:
            copy.draft_state = self._heads.copy(self.draft_state, num_rows)
            copy.draft_state.target_cache = copy.cache
        return copy
