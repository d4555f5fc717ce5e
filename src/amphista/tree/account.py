"""Account: what a request has gained or lost against plain decoding, in tokens, so that no request pays for others.

A step gives a request its tokens and takes as many as plain decoding would have given it meanwhile. A plain step is
even. FORGIVEN of what it takes is let off, so that small losses do not add up for ever.

Law: where a request behind SPENT makes its batch decode plainly, it ends with at least 1 - FORGIVEN of its plain
tokens, less 8 (SPENT) and what one step can lose, whatever drafters claim.
"""

from __future__ import annotations

from dataclasses import dataclass

FORGIVEN = 0.02
WARY, SPENT = -4.0, -8.0  # from here on a request refuses what it would lose by; and everything but plain decoding
CREDIT = 64.0  # more is not kept: a drafter that was good once may not lose it all again
MEMORY = 0.94  # what a past step still counts in `trust` after each further one
FIRST_CLAIM = 2.0  # accepted tokens, claimed and come true, before anything is known


@dataclass
class Account:
    """Tokens a request is ahead of plain decoding (`balance`, negative: behind), and how far drafts kept their word."""

    balance: float = 0.0
    claimed: float = FIRST_CLAIM
    accepted: float = FIRST_CLAIM

    @property
    def is_wary(self) -> bool:
        """Whether it refuses steps that it would lose by."""
        return self.balance < WARY

    @property
    def is_spent(self) -> bool:
        """Whether its batch has to decode plainly."""
        return self.balance < SPENT

    @property
    def trust(self) -> float:
        """Accepted over claimed tokens; only a wary request asks, the others believe their drafts."""
        return min(1.0, self.accepted / self.claimed) if self.is_wary else 1.0

    def book(self, num_accepted: int, claimed: float, plain_steps: float) -> None:
        """Count a step: accepted draft tokens, how many were claimed, and how many plain steps its time was worth."""
        self.balance = min(CREDIT, self.balance + 1 + num_accepted - (1 - FORGIVEN) * plain_steps)
        if claimed > 0:
            self.claimed = MEMORY * self.claimed + claimed
            self.accepted = MEMORY * self.accepted + num_accepted
