"""Plain decoding of a ragged batch: one target forward gives every running sequence its next token.

Sequences have their own lengths, limits and sampling; a slot is refilled as soon as its sequence ends, and the slots
left over at the end are moved together, so that no forward computes a row nobody reads. Prompts are read one at a time,
by the same `Engine.start` as anywhere else: a prompt of a hundred tokens fills the machine by itself.

Law: each sequence's tokens are those of its prompt decoded alone, whatever the batch, its size and the order of
admission; exactly so by the choice and its noise. The forward of a row beside others may differ in its last bits: in
float32 only a tie could turn on that, in bfloat16 and float16 a sequence may leave the one decoded alone after a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from amphista.accept.sampling import choose_each
from amphista.drafter.none import NoDrafter
from amphista.engine.loops import LoopWatch, loop_free_length
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.sequence import Context, Sequence
from amphista.engine.step import Engine
from amphista.errors import ConfigError, RequestError
from amphista.target.target import Target
from amphista.tree.grow import parse_tree

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class Request(Generic[Tag]):
    """A prompt to decode; `tag` is the caller's own and comes back with the result."""

    prompt_ids: list[int]
    params: SamplingParams
    tag: Tag


@dataclass(frozen=True)
class Finished(Generic[Tag]):
    """A request that has ended. `token_ids`: its output, the end token included, a loop cut off."""

    request: Request[Tag]
    token_ids: list[int]
    reason: FinishReason


class _Row(Generic[Tag]):
    """A sequence in its slot."""

    def __init__(self, request: Request[Tag], sequence: Sequence, watch: LoopWatch | None) -> None:
        self.request, self.sequence, self._watch = request, sequence, watch
        self.look_out()

    def look_out(self) -> None:
        """End the sequence where its last token completed a loop, and cut that off."""
        sequence = self.sequence
        if self._watch is not None and self._watch.push(sequence.pending) and sequence.finish_reason is None:
            del sequence.output_ids[loop_free_length(sequence.output_ids) :]
            sequence.finish_reason = FinishReason.LOOP


class BatchDecoder(Generic[Tag]):
    """Decodes any number of requests, up to `num_slots` of them at a time.

    cut_loops: end an answer once it loops (`engine/loops.py`) and keep its loop-free prefix. `num_tokens` and
    `num_forwards` count what was decoded (prefills give a token, too, but are no decode forwards).
    """

    def __init__(self, target: Target, num_slots: int, *, cut_loops: bool = False) -> None:
        if num_slots < 1:
            raise ConfigError(f"a batch of {num_slots}: expected at least 1 sequence")
        self._target, self._cut_loops = target, cut_loops
        self._engine = Engine(target, NoDrafter(), parse_tree(1))
        self._slots = target.new_slots(num_slots)
        self._contexts = [Context(slot, self._engine.drafter.start()) for slot in self._slots.slots]
        self._rows: list[_Row[Tag]] = []  # row i decodes in slot i
        self.num_tokens = 0
        self.num_forwards = 0

    def run(
        self,
        requests: Iterable[Request[Tag]],
        follow: Callable[[Finished[Tag]], Request[Tag] | None] = lambda finished: None,
    ) -> Iterator[Finished[Tag]]:
        """Decode all requests; yields each as it ends.

        follow: called with each result after it was yielded; what it returns takes over the slot at once, and what both
        prompts share is not read again (the next turn of a conversation). Requests are taken from their iterable only
        when a slot is free. raises RequestError for a prompt that cannot be decoded.
        """
        waiting = iter(requests)
        try:
            while len(self._rows) < len(self._contexts):
                request = next(waiting, None)
                if request is None:
                    break
                self._rows.append(self._start(request, self._contexts[len(self._rows)]))
                yield from self._settle(len(self._rows) - 1, waiting, follow)
            while self._rows:
                self._step()
                for index in reversed(range(len(self._rows))):
                    yield from self._settle(index, waiting, follow)
        finally:
            self._rows.clear()

    def check_integrity(self) -> None:
        """Raise CapacityError when the slots' layers disagree."""
        self._slots.check_integrity()

    def _start(self, request: Request[Tag], context: Context) -> _Row[Tag]:
        if request.params.logprobs:
            raise RequestError("log-probabilities are not told of answers decoded in a batch")
        sequence, _ = self._engine.start(request.prompt_ids, request.params, context)
        self.num_tokens += 1
        return _Row(request, sequence, LoopWatch() if self._cut_loops else None)

    def _settle(
        self, index: int, waiting: Iterator[Request[Tag]], follow: Callable[[Finished[Tag]], Request[Tag] | None]
    ) -> Iterator[Finished[Tag]]:
        """Hand out what has ended in one slot and refill it, or close it when nothing is waiting."""
        while (reason := self._rows[index].sequence.finish_reason) is not None:
            row = self._rows[index]
            finished = Finished(row.request, row.sequence.output_ids, reason)
            yield finished
            request = follow(finished) or next(waiting, None)
            if request is None:
                self._close(index)
                return
            self._rows[index] = self._start(request, self._contexts[index])

    def _close(self, index: int) -> None:
        """Take a row out; the last one moves into its place."""
        last = self._rows.pop()
        if index == len(self._rows):
            self._contexts[index].cache.trim(0)
            self._contexts[index].draft_state.num_rows = 0
            return
        self._rows[index] = last
        self._slots.move(len(self._rows), index)
        contexts = self._contexts
        contexts[index], contexts[len(self._rows)] = contexts[len(self._rows)], contexts[index]
        for slot in (index, len(self._rows)):
            contexts[slot].cache = self._slots.slots[slot]
        contexts[len(self._rows)].draft_state.num_rows = 0

    def _step(self) -> None:
        """One token more for every row."""
        sequences = [row.sequence for row in self._rows]
        output = self._target.extend([sequence.pending for sequence in sequences], self._slots)
        choosers = [sequence.chooser for sequence in sequences]
        tokens = choose_each(choosers, output.logits, [sequence.root_position + 1 for sequence in sequences])
        for row, token in zip(self._rows, tokens, strict=True):
            row.sequence.take([token])
            row.sequence.context.draft_state.num_rows += 1  # all that `none` keeps
            row.look_out()
        self.num_tokens += len(tokens)
        self.num_forwards += 1
