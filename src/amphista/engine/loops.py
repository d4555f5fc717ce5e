"""Answers that loop. Small models do under greedy decoding, and a loop is trivially draftable: tau and speedups are
therefore also reported on the loop-free prefix of each answer (ALGORITHM section 8).
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_SPAN = 64
MIN_REPEATS = 3
MIN_COVERED = 24


def _repeats(span: int) -> int:
    """How often a span must stand in a row to be a loop."""
    return max(MIN_REPEATS, -(-MIN_COVERED // span))


def loop_free_length(token_ids: Sequence[int]) -> int:
    """Tokens before an answer begins to loop: all of them if it never does.

    A loop is a span of at most 64 tokens that stands at least three times in a row and covers at least 24 tokens; the
    prefix ends after the first occurrence of the first such span.
    """
    best: tuple[int, int] | None = None  # (start, span)
    for span in range(1, min(LONGEST_SPAN, len(token_ids) // MIN_REPEATS) + 1):
        needed = span * (_repeats(span) - 1)  # that many tokens equal the one a span later
        run = 0
        for i in range(len(token_ids) - span):
            run = run + 1 if token_ids[i] == token_ids[i + span] else 0
            if run == needed:
                start = i + 1 - needed
                if best is None or (start, span) < best:
                    best = (start, span)
                break
    return len(token_ids) if best is None else best[0] + best[1]


class LoopWatch:
    """Follows an answer token by token: `push` is True from the token on that completes its first loop.

    Law: that is the first token at which `loop_free_length` of all tokens so far is less than their number.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._runs = [0] * (LONGEST_SPAN + 1)  # by span: tokens in a row that equal the one a span before

    def copy(self) -> LoopWatch:
        """Another that goes on from here."""
        other = LoopWatch()
        other._ids, other._runs = list(self._ids[-LONGEST_SPAN:]), list(self._runs)
        return other

    def push(self, token: int) -> bool:
        """Add a token; whether the answer loops."""
        ids, runs, looped = self._ids, self._runs, False
        for span in range(1, min(LONGEST_SPAN, len(ids)) + 1):
            runs[span] = runs[span] + 1 if ids[-span] == token else 0
            looped = looped or runs[span] >= TOKENS_TO_LOOP[span]
        ids.append(token)
        return looped


TOKENS_TO_LOOP = [0] + [span * (_repeats(span) - 1) for span in range(1, LONGEST_SPAN + 1)]


def steps_within(accepted: Sequence[int], num_tokens: int, prefill_tokens: int = 1) -> int:
    """Decode steps that commit the first `num_tokens` tokens, of which the prefill gave `prefill_tokens`.

    A step that crosses the edge counts, with its tokens up to it.
    """
    committed, steps = prefill_tokens, 0
    for count in accepted:
        if committed >= num_tokens:
            break
        committed += count + 1
        steps += 1
    return steps
