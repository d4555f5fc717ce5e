"""Worth: whether drafting has paid lately where several sequences share a step, as a whole.

Trees are weighed by what their rows take in the forward. What drafting takes outside it (looking up, weighing) is
little beside the step of one sequence, but is taken for each of many, who may earn it back with none of their drafts.
"""

from __future__ import annotations

from dataclasses import dataclass

TRIAL = 256  # steps, each sequence's counted, after which what drafts brought is weighed: it comes in bursts
FIRST_REST, LONGEST_REST = 32, 128  # plain steps where they did not pay; twice as many after each failure


@dataclass
class Worth:
    """Of the steps of about so many sequences."""

    _balance: float = 0.0  # seconds
    _num_tried: int = 0
    _num_left: int = 0
    _rest: int = FIRST_REST

    def rests(self) -> bool:
        """Whether the next step looks for no drafts; to be asked once a step."""
        self._num_left -= 1
        return self._num_left >= 0

    def note(self, number: int, won: float, planning: float) -> None:
        """Count a step of so many sequences that did not rest: the seconds that its drafts won, and those that planning
        took. The first of a trial takes up what was left lying in the rest, whatever comes of it."""
        self._balance += won - (planning if self._num_tried else 0.0)
        self._num_tried += number
        if self._num_tried < TRIAL:
            return
        if self._balance < 0:
            self._num_left, self._rest = self._rest, min(2 * self._rest, LONGEST_REST)
        else:
            self._rest = FIRST_REST
        self._balance, self._num_tried = max(0.0, self._balance / 2), 0
