"""Sequence: the state of one request, and the only one.

Invariant between steps, once its prompt is read: the caches hold every token but the last, which is pending. Before
that, and after a preemption, they hold fewer: then the next steps read chunks of what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Several
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from amphista.accept.chooser import Chooser
from amphista.accept.logprobs import TokenLogprob
from amphista.drafter.lookup import Lookup
from amphista.engine.loops import LoopWatch, loop_free_length
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.prefixes import Match
from amphista.engine.sequence_cache import SequenceCache
from amphista.engine.stats import DecodeStats
from amphista.errors import CapacityError
from amphista.target.target import PREFILL_CHUNK
from amphista.target.text import IncrementalText
from amphista.tree.controller import DraftController


@dataclass(frozen=True)
class Ending:
    """How many of some chosen tokens become part of an answer, and whether it ends with them."""

    num_taken: int
    reason: FinishReason | None
    stops: IncrementalText | None
    watch: LoopWatch | None


@dataclass(kw_only=True, eq=False)
class Sequence:
    """One request: `token_ids` are its prompt and its answer so far, the end token included.

    stops: the text so far, where a stop string may end it; else text is the reader's. watch: where answers that loop
    are ended and cut. chunk_len: how many tokens of its prompt the next step may read. drafts: whether anything is
    proposed for it; else it is decoded plainly, in whatever batch. is_traced: whether its steps tell their trees.
    prompt_logprobs: those of its prompt's tokens but the first, as far as it is read; an empty list asks for them, and
    then it must read its prompt itself: no rows may be adopted. cut_off: the loop that was cut off its end.
    """

    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    chooser: Chooser
    end_ids: frozenset[int]
    max_positions: int
    rows: SequenceCache
    lookup: Lookup | None = None
    stops: IncrementalText | None = None
    watch: LoopWatch | None = None
    chunk_len: int = PREFILL_CHUNK
    drafts: bool = True
    is_traced: bool = False
    stats: DecodeStats = field(default_factory=DecodeStats)
    controller: DraftController = field(default_factory=DraftController)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    cut_off: list[int] = field(default_factory=list)

    @property
    def prompt_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt]

    @property
    def output_ids(self) -> list[int]:
        """The answer so far."""
        return self.token_ids[self.num_prompt :]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def pending(self) -> int:
        """Chosen by the target, not yet in any cache: the root of the next tree."""
        return self.token_ids[-1]

    @property
    def root_position(self) -> int:
        """Absolute position of the pending token."""
        return len(self.token_ids) - 1

    @property
    def num_unread(self) -> int:
        """Tokens to read before it decodes: its prompt, after a preemption its answer so far, too."""
        return len(self.token_ids) - self.rows.num_rows - bool(self.num_output)

    @property
    def num_left(self) -> int:
        """Tokens that may still be added: what its limit and the context leave."""
        return min(self.params.max_new_tokens - self.num_output, self.max_positions + 1 - len(self.token_ids))

    @property
    def max_depth(self) -> int:
        """How deep a tree may be: a step emits one token more than it accepts, and positions end with the context."""
        return max(0, self.num_left - 1)

    @property
    def only_choices(self) -> bool:
        """Whether of logits nothing is read but which is the largest."""
        return self.chooser.is_argmax and not self.params.logprobs and self.prompt_logprobs is None

    def check(self) -> None:
        """Raise CapacityError where the caches do not hold what this sequence has read."""
        cache = self.rows.cache
        if not cache.num_committed == cache.num_rows == self.rows.num_rows or self.num_unread < 0:
            raise CapacityError(
                f"{cache.num_committed} rows are cached and {cache.num_rows} written, but {self.root_position} tokens "
                "were read"
            )

    def adopt(self, match: Match) -> None:
        """Begin with the matched rows, copied or moved, in place of its own, which are none."""
        rows = match.rows
        assert isinstance(rows, SequenceCache)
        if match.is_copy:
            self.rows = rows.copied(match.num_rows, self.token_ids)
        else:
            rows.keep(match.num_rows)
            rows.token_ids = self.token_ids
            self.rows = rows
        if not self.num_output:  # else it goes on behind a preemption
            self.stats.num_cached_tokens = min(self.rows.num_rows, self.num_prompt)

    def release(self) -> None:
        """Let go of its rows and have none; the prefix store or another sequence may hold them still."""
        if not self.num_output:
            self.stats.num_cached_tokens = 0
        self.rows = self.rows.empty(self.token_ids)

    def ending(self, tokens: list[int]) -> Ending:
        """Take chosen tokens up to the first that ends the answer; nothing of the sequence changes."""
        stops = None if self.stops is None else self.stops.copy()
        watch = None if self.watch is None else self.watch.copy()
        left, reason = self.num_left, None
        for number, token in enumerate(tokens, start=1):
            has_looped = watch is not None and watch.push(token)
            if stops is not None and token not in self.end_ids:
                stops.push(token)
            if token in self.end_ids or (stops is not None and stops.stopped):
                reason = FinishReason.STOP
            elif number >= left:
                reason = FinishReason.LENGTH
            if has_looped and reason is not FinishReason.STOP:
                reason = FinishReason.LOOP
            if reason is not None:
                return Ending(number, reason, stops, watch)
        return Ending(len(tokens), None, stops, watch)

    def take(self, tokens: list[int], ending: Ending) -> None:
        """Add tokens, none behind the end; a loop is cut off."""
        self.token_ids += tokens
        self.stats.num_tokens += len(tokens)
        self.chooser.extend(tokens)
        self.stops, self.watch, self.finish_reason = ending.stops, ending.watch, ending.reason
        if ending.reason is FinishReason.LOOP:
            end = self.num_prompt + loop_free_length(self.output_ids)
            self.cut_off = self.token_ids[end:]  # first: broken off in between, `restore` drops what stands twice
            del self.token_ids[end:]

    def snapshot(self) -> tuple[Any, ...]:
        """What `restore` needs."""
        state = self.stops, self.watch, self.chooser.output
        return (
            len(self.token_ids),
            self.rows.cache.num_committed,
            list(self.rows.unfed),
            len(self.logprobs),
            self.stats.snapshot(),
            state,
        )

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Go back: rows behind those of then are dropped, the others lie untouched below them."""
        num_tokens, num_rows, unfed, num_logprobs, stats, state = snapshot
        self.finish_reason = None
        self.stops, self.watch, self.chooser.output = state
        self.token_ids += self.cut_off  # a loop begins in an earlier step
        self.cut_off = []
        del self.token_ids[num_tokens:], self.logprobs[num_logprobs:]
        self.rows.unfed[:] = unfed
        self.rows.cache.trim(num_rows)
        self.stats.restore(stats)


@contextmanager
def whole_step(batch: Several[Sequence]) -> Iterator[None]:
    """All that a block does to these sequences or, where it is broken off (Ctrl-C), nothing of it."""
    before = [sequence.snapshot() for sequence in batch]
    try:
        yield
    except BaseException:
        for sequence, snapshot in zip(batch, before, strict=True):
            sequence.restore(snapshot)
        raise
