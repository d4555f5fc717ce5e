"""Prefill and steps until done: the streaming primitive that everything else sums up."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.sequence import Context, Sequence
from amphista.engine.step import Engine, StepResult


class Decoding:
    """Iterate to decode; nothing is read before that. All state belongs to this one call.

    An iterator of its own: reading on after a break, or after an interrupt inside a step, goes on where it stopped.
    Any thread may take the next step, one at a time. raises RequestError for what cannot be decoded, at once.
    """

    def __init__(
        self, engine: Engine, prompt_ids: list[int], params: SamplingParams, context: Context | None = None
    ) -> None:
        engine.check(prompt_ids, params)
        self.prompt_ids, self.params = list(prompt_ids), params.with_seed()
        self.engine, self._context = engine, context
        self._lock = threading.Lock()
        self.is_closed = False
        self.sequence: Sequence | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it has not."""
        reason = None if self.sequence is None else self.sequence.finish_reason
        return FinishReason.ABORT if reason is None and self.is_closed else reason

    def close(self) -> None:
        """End here, behind the step that another thread may be in; what was decoded stays."""
        with self._lock:
            self.is_closed = True

    def __iter__(self) -> Iterator[StepResult]:
        return self

    def __next__(self) -> StepResult:
        with self._lock:
            if self.finish_reason is not None:
                raise StopIteration
            if self.sequence is not None:
                return self.engine.step(self.sequence)
            self.sequence, first = self.engine.start(self.prompt_ids, self.params, self._context)
            return first


def decode(engine: Engine, prompt_ids: list[int], params: SamplingParams, context: Context | None = None) -> Sequence:
    """Decode one prompt to its end."""
    sequence, _ = engine.start(prompt_ids, params, context)
    while sequence.finish_reason is None:
        engine.step(sequence)
    return sequence
