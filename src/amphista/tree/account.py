"""Account: what a request has gained or lost against plain decoding, in tokens, so that no request pays for others.

A step gives a request its tokens and takes as many as plain decoding would have given it meanwhile; a plain step is
even. FORGIVEN of what is taken is let off, so that small losses do not add up for ever.

Law: where a request behind SPENT makes its batch decode plainly, it ends with at least 1 - FORGIVEN of its plain
tokens, less 8 (SPENT) and what one step can lose, whatever drafters claim.
"""

from __future__ import annotations

from dataclasses import dataclass

FORGIVEN = 0.02
WARY, SPENT = -4.0, -8.0  # below: refuses steps that claim too little for it; refuses everything but plain decoding
CREDIT = 64.0  # more is not kept: a drafter that was good once may not lose it all again


@dataclass
class Account:
    """Tokens that a request is ahead of plain decoding; a negative balance: behind."""

    balance: float = 0.0

    @property
    def is_wary(self) -> bool:
        """Whether it refuses steps in which it would lose, by what its own drafts claim."""
        return self.balance < WARY

    @property
    def is_spent(self) -> bool:
        """Whether its batch has to decode plainly."""
        return self.balance < SPENT

    def book(self, num_tokens: int, plain_steps: float) -> None:
        """Count a step: the tokens it gave, and how many plain steps its time was worth."""
        self.balance = min(CREDIT, self.balance + num_tokens - (1 - FORGIVEN) * plain_steps)
