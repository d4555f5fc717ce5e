"""How many threads a call of the C step gets: all that torch has, or fewer while other programs have their cores.

Threads meet at a barrier behind every stage. Where another program has the core of one of them, all wait for it, and
yield their own cores meanwhile: two threads beside one busy program have been seen to take five times as long as one
alone (benchmarks/zen4-2-cores/busy.txt). So a crew that waits for most of its time gets smaller by as much. It grows
again when it has worked well for a while, and where that was too early, waits twice as long the next time. The number
of threads changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

WINDOW = 0.05  # seconds of calls that weigh
MOST_WAITING = 0.5  # of that time
FIRST_PATIENCE, MOST_PATIENCE = 0.5, 8.0  # seconds of calls


class Crew:
    """Of all calls of a process: what they compete for is the same."""

    def __init__(self) -> None:
        self._most: int | None = None  # None: all there are
        self._before: int | None = None  # it grew from so many
        self._elapsed = self._waited = 0.0  # of late
        self._since = 0.0  # seconds of calls since it changed
        self._patience = FIRST_PATIENCE
        self._is_whole = False

    def num_threads(self) -> int:
        """For the next call."""
        asked = torch.get_num_threads()
        return asked if self._most is None or self._is_whole else min(asked, self._most)

    def note(self, team: int, waited: float, elapsed: float) -> None:
        """After a call of `team` threads: seconds it took, and for how many of these each waited for others."""
        asked = torch.get_num_threads()
        if self._is_whole or elapsed <= 0:
            return
        kept = WINDOW / (WINDOW + elapsed)
        lost = waited * team / max(1, team - 1)  # one may have been late alone
        self._elapsed = kept * self._elapsed + elapsed
        self._waited = kept * self._waited + min(lost, elapsed)
        self._since += elapsed
        waiting = self._waited / self._elapsed
        if team > 1 and waiting > MOST_WAITING and self._elapsed > WINDOW / 2:
            self._shrink(team, waiting)
        elif team < asked and self._since > self._patience:
            self._change(team + (asked - team + 1) // 2, before=team)

    def _shrink(self, team: int, waiting: float) -> None:
        if self._before is not None and self._since < FIRST_PATIENCE:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
            self._change(self._before)
        else:
            self._patience = FIRST_PATIENCE
            self._change(max(1, int(team * (1 - waiting))))

    def _change(self, most: int, before: int | None = None) -> None:
        self._most, self._before = most, before
        self._elapsed = self._waited = self._since = 0.0

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All threads in every call, whoever is in the way: for what measures that, and what tests threads."""
        before, self._is_whole = self._is_whole, True
        try:
            yield
        finally:
            self._is_whole = before


CREW = Crew()
