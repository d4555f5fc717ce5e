"""Prefill and steps until done: the streaming primitive that everything else sums up."""

from __future__ import annotations

from collections.abc import Iterator

from amphista.engine.params import SamplingParams
from amphista.engine.sequence import Context, Sequence
from amphista.engine.step import Engine, StepResult


class Decoding:
    """Iterate to decode; `sequence` is complete once the iteration ends. All state belongs to this one call.

    An iterator of its own: reading on after a break goes on where it stopped.
    """

    def __init__(
        self, engine: Engine, prompt_ids: list[int], params: SamplingParams, context: Context | None = None
    ) -> None:
        self._engine = engine
        self.sequence, first = engine.start(prompt_ids, params, context)
        self._first: StepResult | None = first

    def __iter__(self) -> Iterator[StepResult]:
        return self

    def __next__(self) -> StepResult:
        first, self._first = self._first, None
        if first is not None:
            return first
        if self.sequence.finish_reason is not None:
            raise StopIteration
        return self._engine.step(self.sequence)


def decode(engine: Engine, prompt_ids: list[int], params: SamplingParams, context: Context | None = None) -> Sequence:
    """Decode one prompt to its end."""
    decoding = Decoding(engine, prompt_ids, params, context)
    for _ in decoding:
        pass
    return decoding.sequence
