"""An answer as its reader meets it: text piece by piece, then the whole of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Self

from amphista.accept.logprobs import TokenLogprob
from amphista.engine.decoder import Decoding
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.stats import DecodeStats
from amphista.engine.step import StepResult
from amphista.errors import RequestError


@dataclass(frozen=True)
class Answer:
    """A finished answer. `token_ids` hold the end token or a completed stop string, `text` does not.

    `params` are those it was made with, the seed included; `logprobs` one record a token, where they were asked for.
    """

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    finish_reason: FinishReason
    stats: DecodeStats
    params: SamplingParams
    logprobs: list[TokenLogprob] | None = None


class Stream:
    """Iterate, or `async for`, for text pieces; once the iteration has ended, `answer` is there.

    Nothing is decoded before the first piece is asked for. `close`, or leaving a `with` block, ends it early: the
    answer then is what had come. worker: where `async for` takes its steps, a single thread, because recorded forwards
    belong to one. on_end: called once with the answer, when the stream has ended or is closed.
    """

    def __init__(
        self, decoding: Decoding, worker: Callable[[], Executor], on_end: Callable[[Answer], None] | None = None
    ) -> None:
        self._decoding, self._worker, self._on_end = decoding, worker, on_end
        self._lock = threading.RLock()
        self._reader = (decoding.engine.new_text(decoding.params), 0)  # and how many tokens it has read
        self._answer: Answer | None = None

    @property
    def stats(self) -> DecodeStats:
        """Counters, growing while the stream runs."""
        sequence = self._decoding.sequence
        return DecodeStats() if sequence is None else sequence.stats

    def __iter__(self) -> Iterator[str]:
        return (result.text for result in self.steps() if result.text)

    async def __aiter__(self) -> AsyncIterator[str]:
        """Pieces, each step in the worker thread."""
        steps, loop = self.steps(), asyncio.get_running_loop()
        while (result := await loop.run_in_executor(self._worker(), next, steps, None)) is not None:
            if result.text:
                yield result.text

    def steps(self) -> Iterator[StepResult]:
        """The same stream, one record per target forward."""
        for result in self._decoding:
            yield replace(result, text=self._read())
        if text := self._read():  # of a step whose reading was interrupted
            yield StepResult([], 0, text=text)
        self._end()

    def close(self) -> None:
        """Decode no further."""
        self._decoding.close()
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def answer(self) -> Answer:
        """The finished answer; raises RequestError while the stream still runs."""
        self._end()
        if self._answer is None:
            raise RequestError("the stream has not ended: read it to its end, or close it")
        return self._answer

    def _read(self) -> str:
        """The text of the tokens that have come since; read by a copy, so that an interrupt loses none."""
        with self._lock:
            sequence, (reader, num_read) = self._decoding.sequence, self._reader
            if reader is None or sequence is None:
                return ""
            reader, output_ids = reader.copy(), sequence.output_ids[num_read:]
            pieces = [reader.push(token) for token in output_ids if token not in sequence.end_ids]
            if self._decoding.finish_reason is not None:
                pieces.append(reader.finish())
            self._reader = (reader, num_read + len(output_ids))
            return "".join(pieces)

    def _end(self) -> None:
        """Make the answer, once, where there is a reason to."""
        with self._lock:
            sequence, reason = self._decoding.sequence, self._decoding.finish_reason
            if reason is None or self._answer is not None:
                return
            self._read()
            reader, _ = self._reader
            self._answer = Answer(
                text="" if reader is None else reader.value,
                token_ids=[] if sequence is None else list(sequence.output_ids),
                prompt_ids=self._decoding.prompt_ids,
                finish_reason=reason,
                stats=self.stats,
                params=self._decoding.params,
                logprobs=list(sequence.logprobs) if sequence is not None and sequence.params.logprobs else None,
            )
            if self._on_end is not None:
                self._on_end(self._answer)


def finish(stream: Stream) -> Answer:
    """Read a stream to its end."""
    for _ in stream.steps():
        pass
    return stream.answer
