"""An answer as its reader meets it: text piece by piece, then the whole of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Self

from amphista.accept.logprobs import TokenLogprob
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.sequence import Sequence
from amphista.engine.stats import DecodeStats
from amphista.engine.step import Engine, StepResult
from amphista.errors import RequestError


@dataclass(frozen=True)
class Answer:
    """A finished answer. `token_ids` hold the end token or a completed stop string, `text` does not.

    `params` are those it was made with, the seed included; `logprobs` one record a token, where they were asked for.
    `error`: why an answer of several (`generate` of a list) could not go on; what had come before is in it.
    """

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    finish_reason: FinishReason
    stats: DecodeStats
    params: SamplingParams
    logprobs: list[TokenLogprob] | None = None
    error: BaseException | None = None


class Stream:
    """Iterate, or `async for`, for text pieces; once the iteration has ended, `answer` is there.

    Nothing is decoded before the first piece is asked for. `close`, or leaving a `with` block, ends it early: the
    answer then is what had come. An iterator of its own: reading on after a break, or after an interrupt inside a step,
    goes on where it stopped; any thread may take the next step. worker: where `async for` takes its steps, a single
    thread, because recorded forwards belong to one. on_end: called once with the answer, when the stream has ended or
    is closed.
    """

    def __init__(
        self,
        engine: Engine,
        request: Sequence,
        worker: Callable[[], Executor],
        on_end: Callable[[Answer], None] | None = None,
    ) -> None:
        self._engine, self.request, self._worker, self._on_end = engine, request, worker, on_end
        self._stepping, self._lock = threading.Lock(), threading.RLock()
        self._reader = (engine.new_text(request.params), 0)  # and how many tokens it has read
        self._is_closed = False
        self._answer: Answer | None = None

    @property
    def stats(self) -> DecodeStats:
        """Counters, growing while the stream runs."""
        return self.request.stats

    def __iter__(self) -> Iterator[str]:
        return (result.text for result in self.steps() if result.text)

    async def __aiter__(self) -> AsyncIterator[str]:
        """Pieces, each step in the worker thread. Read here, so that a reader who gives up in mid step loses none."""
        loop, goes_on = asyncio.get_running_loop(), True
        while goes_on:
            goes_on = await loop.run_in_executor(self._worker(), self._step) is not None
            if text := self._read():
                yield text
        self._end()

    def steps(self) -> Iterator[StepResult]:
        """The same stream, one record per target forward that added tokens."""
        while (result := self._step()) is not None:
            if result.token_ids:
                yield replace(result, text=self._read())
        if text := self._read():  # of a step whose reading was interrupted
            yield StepResult([], 0, text=text)
        self._end()

    def _step(self) -> StepResult | None:
        """One forward; None where the answer has ended."""
        with self._stepping:
            if self._finish_reason is not None:
                return None
            (result,) = self._engine.step([self.request])
        if isinstance(result, Exception):
            raise result
        return result

    @property
    def _finish_reason(self) -> FinishReason | None:
        reason = self.request.finish_reason
        return FinishReason.ABORT if reason is None and self._is_closed else reason

    def close(self) -> None:
        """Decode no further, behind the step that another thread may be in; what was decoded stays."""
        with self._stepping:
            self._is_closed = True
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
            request, (reader, num_read) = self.request, self._reader
            if reader is None or not request.num_output:
                return ""
            reader, output_ids = reader.copy(), request.token_ids[request.num_prompt + num_read :]
            pieces = [reader.push_all([token for token in output_ids if token not in request.end_ids])]
            if self._finish_reason is not None:
                pieces.append(reader.finish())
            self._reader = (reader, num_read + len(output_ids))
            return "".join(pieces)

    def _end(self) -> None:
        """Make the answer, once, where there is a reason to."""
        with self._lock:
            reason = self._finish_reason
            if reason is None or self._answer is not None:
                return
            self._read()
            reader, _ = self._reader
            self._answer = answer_of(self.request, "" if reader is None else reader.value, reason)
            if self._on_end is not None:
                self._on_end(self._answer)


def answer_of(request: Sequence, text: str, reason: FinishReason, error: BaseException | None = None) -> Answer:
    """What a request has come to."""
    return Answer(
        text=text,
        token_ids=request.output_ids,
        prompt_ids=request.prompt_ids,
        finish_reason=reason,
        stats=request.stats,
        params=request.params,
        logprobs=list(request.logprobs) if request.params.logprobs else None,
        error=error,
    )


def finish(stream: Stream) -> Answer:
    """Read a stream to its end."""
    for _ in stream.steps():
        pass
    return stream.answer
