"""Where the last tokens of a text stood before: an index of its n-grams, grown token by token.

A token costs one dictionary entry per n, so a step never reads the text again.
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (8, 5, 3, 2, 1)  # longest first; other choices between 1 and 16 found the same continuations
LONGEST_MATCH = 16  # matches beyond are told apart no further


class NgramIndex:
    """The n-grams of `tokens`, all of them up to the last one.

    repeats: whether each token is what had followed where the text before it stood last; None where that was new.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.repeats: list[bool | None] = []
        self._last: list[dict[tuple[int, ...], int]] = [{} for _ in SIZES]  # n-gram -> where it ended last
        self._before = [-1] * len(SIZES)  # where the text's last n-gram ended before, or -1

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end."""
        for token in tokens:
            at, place = len(self.tokens), self._place()
            self.repeats.append(None if place < 0 else self.tokens[place + 1] == token)
            self.tokens.append(token)
            for n, (size, last) in enumerate(zip(SIZES, self._last, strict=True)):
                gram = tuple(self.tokens[max(0, at + 1 - size) :])  # shorter near the start, and like no other then
                self._before[n] = last.get(gram, -1)
                last[gram] = at

    def match(self) -> tuple[int, int] | None:
        """(index, length): the most recent earlier place of the longest n-gram that the text ends with, and how many
        tokens up to it equal the text's last ones, at most LONGEST_MATCH."""
        end, place = len(self.tokens) - 1, self._place()
        if place < 0:
            return None
        length = 1
        while length <= min(place, LONGEST_MATCH - 1) and self.tokens[place - length] == self.tokens[end - length]:
            length += 1
        return place, length

    def continuation(self, place: int, num_tokens: int) -> list[int]:
        """Where the tokens are that followed the one at `place`; behind the text's end they come once more."""
        period = len(self.tokens) - 1 - place
        return [place + 1 + ahead % period for ahead in range(num_tokens)]

    def _place(self) -> int:
        """The most recent earlier place of the longest n-gram that the text ends with, or -1."""
        return next((before for before in self._before if before >= 0), -1)
