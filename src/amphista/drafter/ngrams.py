"""Where the last tokens of a text stood before: an index of its n-grams, grown and cut back token by token.

A token costs one dictionary entry per n and cutting it off undoes exactly that, so a step never reads the text again
and a next chat turn keeps what both turns share. Each n-gram remembers the place before its own (`_before`), which is
at once the answer to "where did the text's end stand before?" and what undoing needs.
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
        self._before: list[list[int]] = [[] for _ in SIZES]  # per token: where its n-gram ended before, or -1

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end."""
        for token in tokens:
            at = len(self.tokens)
            self.tokens.append(token)
            for size, last, before in zip(SIZES, self._last, self._before, strict=True):
                gram = self._gram(at, size)
                before.append(last.get(gram, -1))
                last[gram] = at

    def trim(self, num_tokens: int) -> None:
        """Forget all tokens behind the first `num_tokens`."""
        while len(self.tokens) > num_tokens:
            at = len(self.tokens) - 1
            for size, last, before in zip(SIZES, self._last, self._before, strict=True):
                earlier = before.pop()
                if earlier >= 0:
                    last[self._gram(at, size)] = earlier
                else:
                    del last[self._gram(at, size)]
            self.tokens.pop()

    def _gram(self, at: int, size: int) -> tuple[int, ...]:
        """The n-gram that ends at `at`; near the start of the text it is shorter, and no other n-gram equals it."""
        return tuple(self.tokens[max(0, at + 1 - size) : at + 1])

    def match(self) -> tuple[int, int] | None:
        """(index, length): the most recent earlier place of the longest n-gram that the text ends with, and how many
        tokens up to it equal the text's last ones, at most LONGEST_MATCH."""
        end = len(self.tokens) - 1
        place = next((before[end] for before in self._before if end >= 0 and before[end] >= 0), -1)
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
