"""A model made of integers: what scheduler, prefix store and loop see of a sequence and an engine, without tensors.

A row is a hash of all tokens up to its own, beside the token that followed (as a drafter's rows are); the next token is
made of the last row. So a row of another request, of another position or with another next token shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

EOS = 0


def next_token(row: int) -> int:
    """What follows a row; one in 40 ends the answer."""
    token = row % 40
    return EOS if token == 0 else 1 + row // 40 % 999


def answer_alone(prompt: list[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
    """The answer of a prompt decoded by itself."""
    row, answer = 0, []
    for token in prompt:
        row = hash((row, token))
    while len(answer) < max_tokens and (ignore_eos or answer[-1:] != [EOS]):
        answer.append(next_token(row))
        row = hash((row, answer[-1]))
    return answer


@dataclass(eq=False)
class Rows:
    """Rows and their tokens; `row_bytes` is 10, and `slack` rows are allocated beyond."""

    token_ids: list[int] = field(default_factory=list)
    rows: list[tuple[int, int]] = field(default_factory=list)
    slack: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        return 10 * (len(self.rows) + (self.slack if self.rows else 0))

    def append(self, token: int, following: int) -> int:
        row = hash((self.rows[-1][0] if self.rows else 0, token))
        self.token_ids.append(token)
        self.rows.append((row, following))
        return row

    def trim(self, num_rows: int) -> None:
        del self.token_ids[num_rows:], self.rows[num_rows:]


class FakeSequence:
    """One request over integers."""

    def __init__(self, prompt: list[int], max_tokens: int, *, ignore_eos: bool = False, slack: int = 0) -> None:
        self.prompt, self.max_tokens, self.ignore_eos, self.slack = list(prompt), max_tokens, ignore_eos, slack
        self.token_ids = list(prompt)
        self.rows = Rows(slack=slack)
        self.chunk_len = 0
        self.num_adopted: list[tuple[int, bool]] = []
        self.num_released = 0
        self.adopt_error: Exception | None = None

    @property
    def answer(self) -> list[int]:
        return self.token_ids[len(self.prompt) :]

    @property
    def alone(self) -> list[int]:
        """The answer it should get."""
        return answer_alone(self.prompt, self.max_tokens, ignore_eos=self.ignore_eos)

    @property
    def num_unread(self) -> int:
        return len(self.token_ids) - self.rows.num_rows - bool(self.answer)

    @property
    def num_left(self) -> int:
        return self.max_tokens - len(self.answer)

    @property
    def is_finished(self) -> bool:
        return self.num_left == 0 or (self.answer[-1:] == [EOS] and not self.ignore_eos)

    def adopt(self, match) -> None:
        if self.adopt_error is not None:
            raise self.adopt_error
        assert self.rows.num_rows == 0
        self.num_adopted.append((match.num_rows, match.is_copy))
        rows = match.rows
        if match.is_copy:
            rows = Rows(list(rows.token_ids), list(rows.rows), self.slack)
        rows.trim(match.num_rows)
        self.rows = rows
        self.check_rows()

    def release(self) -> None:
        self.check_rows()
        self.num_released += 1
        self.rows = Rows(slack=self.slack)

    def step(self, num_tokens: int) -> list[int]:
        """Read a chunk, or add tokens; returns those added to the answer."""
        if len(self.token_ids) % 16 == 0:
            self.check_rows()
        rows, ids = self.rows, self.token_ids
        num_before = len(self.answer)
        if self.num_unread:
            assert self.chunk_len > 0
            for _ in range(min(self.chunk_len, self.num_unread)):
                token = ids[rows.num_rows]
                if rows.num_rows == len(ids) - 1:  # the last of the prompt
                    ids.append(next_token(hash((rows.rows[-1][0] if rows.rows else 0, token))))
                rows.append(token, ids[rows.num_rows + 1])
        else:
            for _ in range(num_tokens):
                if not self.is_finished:
                    ids.append(next_token(hash((rows.rows[-1][0], ids[-1]))))
                    rows.append(ids[-2], ids[-1])
        return self.answer[num_before:]

    def check_rows(self) -> None:
        """Every row is what a fresh prefill gives."""
        row = 0
        for index, (mine, following) in enumerate(self.rows.rows):
            row = hash((row, self.token_ids[index]))
            assert mine == row, f"row {index} is another's"
            assert following == self.token_ids[index + 1], f"row {index} was made with another next token"


class FakeEngine:
    """Steps fake sequences by one token each, or as `num_tokens` says; fails where it is told to."""

    def __init__(self, num_tokens=lambda: 1) -> None:
        self.num_tokens = num_tokens
        self.row_errors: dict[int, Exception] = {}  # by id of the sequence: this one alone fails
        self.step_error: Exception | None = None  # the next step raises
        self.batches: list[int] = []

    def step(self, batch):
        self.batches.append(len(batch))
        error, self.step_error = self.step_error, None
        if error is not None:
            raise error
        return [self.row_errors.get(id(sequence)) or sequence.step(self.num_tokens()) for sequence in batch]
