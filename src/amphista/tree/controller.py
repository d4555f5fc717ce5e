"""DraftController: what asking a sequence's heads has brought lately, and what it cost.

Whether to ask them has to be known before their word; `NodeBudget` weighs it for all sequences of a batch.
"""

from __future__ import annotations

import math

from amphista.tree.account import Account

MEMORY = 0.98  # what a past draft still counts after each further one: about the last 50 decide
FIRST_WEIGHT = 8.0  # what is expected of a new sequence counts like so many drafts
WORD_WEIGHT = 32.0  # the same where it shall take the others' word
DOUBT = 0.5  # accepted tokens by which the mean of one draft may well be too low, of n drafts by a sqrt(n)th of it
FIRST_REST, LONGEST_REST = 16, 128  # plain steps before the heads are tried again; twice as many after each failure
FADING = 0.5  # what is left of the old evidence then
HOPE = 1.5  # accepted tokens a draft: where a first one would not pay even so, trials only cost


class DraftController:
    """The record of one sequence: its heads' accepted tokens and seconds of their rows, its rests, its account.

    They are counted over the steps in which the heads were asked and no n-gram draft was right, which is what they are
    asked for.
    """

    def __init__(self) -> None:
        self.account = Account()
        self._weight = self._gain = self._rows = 0.0  # sums over drafts, older ones weigh less
        self.rest = FIRST_REST  # plain steps before a trial
        self._rested, self._is_due = 0, False  # due: a trial, as soon as no n-gram draft is likely to be right

    @property
    def is_new(self) -> bool:
        """Whether nothing is known or expected yet."""
        return not self._weight

    @property
    def gain(self) -> float:
        """Accepted tokens a draft."""
        return self._gain / self._weight

    def hoped(self, number: int = 1) -> float:
        """The same as it may well be: heads that seemed not to pay by chance are not left alone for that. number: of
        sequences that draft together, whose mean is less in doubt."""
        return self.gain + DOUBT / math.sqrt(number * self._weight)

    @property
    def row_seconds(self) -> float:
        """What the rows of a draft cost in the forward."""
        return self._rows / self._weight

    def expect(self, gain: float, row_seconds: float, weight: float = FIRST_WEIGHT) -> None:
        """Before anything is known; it counts like `weight` drafts."""
        self._weight, self._gain, self._rows = weight, weight * gain, weight * row_seconds

    def try_again(self, missed: float) -> bool:
        """Whether heads that do not pay are tried this time; once for each step in which they are not asked.

        missed: how likely they are needed.
        """
        if self._is_due:
            return missed >= 0.5
        self.rest_on()
        if self._rested < self.rest:
            return False
        self._rested, self.rest, self._is_due = 0, min(2 * self.rest, LONGEST_REST), True
        self._fade(FADING)
        return False

    @property
    def num_rests(self) -> int:
        """Steps without its heads until `try_again` has something to say."""
        return 0 if self._is_due else max(0, self.rest - self._rested - 1)

    def rest_on(self) -> None:
        """Count a step without its heads."""
        self._rested += 1

    def record(self, num_accepted: int, row_seconds: float) -> None:
        """Count a step in which the heads were asked and no n-gram draft was right."""
        self._fade(MEMORY)
        self._weight += 1
        self._gain += num_accepted
        self._rows += row_seconds

    def update_backoff(self, *, pays: bool) -> None:
        """After a record: a trial is over; where heads pay without one, the next rest is a short one."""
        if pays and not self._is_due:
            self._rested, self.rest = 0, FIRST_REST
        self._is_due = False

    def _fade(self, share: float) -> None:
        self._weight *= share
        self._gain *= share
        self._rows *= share
