"""Where the last tokens of a text stood before: an index of its n-grams, grown token by token.

A token costs one dictionary entry per n, so a step never reads the text again.
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (8, 5, 3, 2, 1)  # longest first; other choices between 1 and 16 found the same continuations
LONGEST_MATCH = 16  # matches beyond are told apart no further


class NgramIndex:
    """The n-grams of `tokens`, all of them up to the last one."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._last: list[dict[tuple[int, ...], int]] = [{} for _ in SIZES]  # n-gram -> where it ended last
        self._before = [-1] * len(SIZES)  # where the text's last n-gram ended before, or -1

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end."""
        for token in tokens:
            at = len(self.tokens)
            self.tokens.append(token)
            for n, (size, last) in enumerate(zip(SIZES, self._last, strict=True)):
                gram = tuple(self.tokens[max(0, at + 1 - size) :])  # shorter near the start, and like no other then
                self._before[n] = last.get(gram, -1)
                last[gram] = at

    def match(self) -> tuple[int, int] | None:
        """(index, length): the most recent earlier place of the longest n-gram that the text ends with, and how many
        tokens up to it equal the text's last ones, at most LONGEST_MATCH."""
        end = len(self.tokens) - 1
        place = next((before for before in self._before if before >= 0), -1)
        if place < 0:
            return None
        length = 1
        while length <= min(place, LONGEST_MATCH - 1) and self.tokens[place - length] == self.tokens[end - length]:
            length += 1
        return place, length

    def continuation(self, place: int, num_tokens: int) -> list[int]:
        """What followed the token at `place`; where that reaches the text's end, it repeats itself."""
        period = len(self.tokens) - 1 - place
        return [self.tokens[place + 1 + ahead % period] for ahead in range(num_tokens)]
