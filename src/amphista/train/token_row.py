"""TokenRow: token ids with the answers among them marked; what training reads, wherever the text came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from amphista.errors import DataError


@dataclass(frozen=True)
class TokenRow:
    """Token ids and, for each, the number of the answer it belongs to (0: none; an end token belongs to its answer).

    `group` keeps several answers to one prompt on the same side of a train / validation split.
    """

    id: str
    group: str
    token_ids: list[int]
    answers: list[int]
    temperature: float | None = None

    @cached_property
    def arrays(self) -> NDArray[np.int64]:
        """Token ids and answers [2, T]: a batch is made of them at every step."""
        return np.array([self.token_ids, self.answers])

    @property
    def num_answer_tokens(self) -> int:
        return sum(1 for answer in self.answers if answer)


def group_of(name: str) -> str:
    """What ids that differ only behind '#' share: answers to one prompt."""
    return name.split("#")[0]


def check_ids(row: TokenRow, where: str, vocab_size: int) -> None:
    """Raise DataError for a token id beyond the vocabulary: the whole file is another target's."""
    worst = next((token for token in row.token_ids if not 0 <= token < vocab_size), None)
    if worst is not None:
        raise DataError(
            f"{where} holds token id {worst}, but the target has {vocab_size} tokens: made for another target?"
        )


def cut_row(row: TokenRow, max_len: int) -> TokenRow:
    """The row without what is behind its first `max_len` tokens."""
    return replace(row, token_ids=row.token_ids[:max_len], answers=row.answers[:max_len])
