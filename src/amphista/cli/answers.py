"""Run prompts through one or two methods and print or write what came out: text for people, JSON lines for programs."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from amphista.cli.standard import is_utf8
from amphista.engine import batch
from amphista.engine.batch import Batch, Finished
from amphista.engine.params import SamplingParams
from amphista.engine.stats import DecodeStats
from amphista.engine.stream import Answer, finish
from amphista.errors import ConfigError, RequestError, TargetError
from amphista.evaluation.lossless import first_divergence
from amphista.llm import LLM, Conversation
from amphista.prompts import PromptRecord

WARM_UP_TOKENS = 8
logger = logging.getLogger("amphista")


@dataclass(frozen=True, kw_only=True)
class AnswerJob:
    """What to answer, how, and where the records go."""

    llm: LLM
    prompts: list[PromptRecord]
    params: SamplingParams
    system: str | None
    raw: bool
    template: dict[str, Any]
    compare: bool
    output: Path | None
    json_lines: bool
    batch_size: int = 1

    @cached_property
    def baseline(self) -> LLM | None:
        """What answers are compared with."""
        return self.llm.baseline if self.compare else None

    def params_of(self, index: int) -> SamplingParams:
        """Settings of a prompt: a seed for all would be one noise for all, so the first takes it, the next one more."""
        seed = self.params.seed
        return self.params if seed is None else replace(self.params, seed=(seed + index) % 2**64)

    def conversation(self) -> Conversation:
        """A new one, for one prompt."""
        return self.llm.conversation(self.system, raw=self.raw, chat_template_kwargs=self.template)


def run_job(job: AnswerJob) -> None:
    """Check every prompt, then answer; each record is written as soon as it exists and its turn has come."""
    first_ids = [_first_ids(job, prompt) for prompt in job.prompts]
    compared: list[dict[str, Any]] = []
    with _sink(job.output) as write:

        def put(record: dict[str, Any]) -> None:
            if job.json_lines:
                print(_json(record, is_utf8(sys.stdout)), flush=True)
            write(_json(record, True) + "\n")
            compared.extend([record] * ("baseline" in record))

        if job.baseline is not None:
            _warm_up(job, job.baseline, first_ids)
        failed = _one_by_one(job, put) if job.batch_size == 1 else _Together(job, put).run()
        if len(compared) > 1 and not job.json_lines:
            print(summary_of_all(compared), file=sys.stderr, flush=True)
    if failed:
        raise RequestError(f"{failed} of {len(job.prompts)} prompts could not be answered to their end")


def _one_by_one(job: AnswerJob, put: Callable[[dict[str, Any]], None]) -> int:
    """Returns how many prompts failed."""
    failed = 0
    for index in range(len(job.prompts)):
        try:
            for record in _answer(job, index):
                put(record)
        except (RequestError, TargetError) as error:  # the other prompts are still answered
            failed += 1
            print(f"amphista: {error}", file=sys.stderr, flush=True)
    return failed


class _Together:
    """Several prompts at a time; a conversation's next turn takes the place of the one before.

    Records come in the order of the prompts, also of those that had ended when the run is broken off.
    """

    def __init__(self, job: AnswerJob, put: Callable[[dict[str, Any]], None]) -> None:
        self._job, self._put = job, put
        self._batch: Batch[tuple[int, int]] = Batch(job.llm.engine, job.batch_size)
        self._conversations = [job.conversation() for _ in job.prompts]
        self._answers: list[list[Answer]] = [[] for _ in job.prompts]
        self._errors: list[Exception | None] = [None] * len(job.prompts)
        self._ended: set[int] = set()
        self._num_put = 0

    def run(self) -> int:
        """Returns how many prompts failed. raises CapacityError before anything is decoded."""
        first = [self._next(index) for index in range(len(self._job.prompts))]
        jobs = [one for one in first if one is not None]
        self._batch.check_memory(jobs)
        try:
            for _ in self._batch.run(jobs, self._follow):
                self._flush()
            self._flush()
        except BaseException:
            self._flush(in_order=False)
            raise
        return sum(error is not None for error in self._errors)

    def _next(self, index: int) -> batch.Job[tuple[int, int]] | None:
        """The next turn of a conversation, if there is one that can be decoded."""
        turns, number = _turns(self._job.prompts[index]), len(self._answers[index])
        if number < len(turns) and self._errors[index] is None:
            try:
                ids = self._conversations[index].prompt_ids(turns[number])
                params = self._job.params_of(index)
                self._job.llm.engine.check(ids, params)
                return batch.Job(ids, params, (index, number), namespace=index)
            except RequestError as error:
                name = self._job.prompts[index].id
                self._errors[index] = RequestError(f"prompt {name}, turn {number + 1}: {error}")
        self._ended.add(index)
        return None

    def _follow(self, finished: Finished[tuple[int, int]]) -> batch.Job[tuple[int, int]] | None:
        index, number = finished.job.tag
        if finished.error is not None:
            self._errors[index] = RequestError(f"prompt {self._job.prompts[index].id}: {finished.error}")
        else:
            answer = self._job.llm.answer_of(finished)
            self._conversations[index].add(_turns(self._job.prompts[index])[number], answer)
            self._answers[index].append(answer)
        return self._next(index)

    def _flush(self, *, in_order: bool = True) -> None:
        """Put the records of prompts that have ended, first to last; a prompt that is still answered holds up those
        behind it, unless the run is broken off."""
        job = self._job
        while self._num_put < len(job.prompts) and (self._num_put in self._ended or not in_order):
            index = self._num_put
            self._num_put += 1
            for number, answer in enumerate(self._answers[index]):
                record = describe(job.llm, job.prompts[index].id, number, answer) | {"batch_size": job.batch_size}
                if job.template:
                    record["template"] = job.template
                if not job.json_lines:
                    print(f"{answer.text}\n", flush=True)
                    print(summary(record), file=sys.stderr, flush=True)
                self._put(record)
            if self._errors[index] is not None and index in self._ended:
                print(f"amphista: {self._errors[index]}", file=sys.stderr, flush=True)


def _json(record: dict[str, Any], with_unicode: bool) -> str:
    return json.dumps(record, ensure_ascii=not with_unicode, allow_nan=False)


def _turns(prompt: PromptRecord) -> Sequence[str | list[dict[str, Any]]]:
    return [prompt.messages] if prompt.messages else prompt.turns


def _first_ids(job: AnswerJob, prompt: PromptRecord) -> list[int]:
    """The first turn's token ids; raises RequestError where it cannot be decoded, or no second one could."""
    try:
        ids = job.conversation().prompt_ids(_turns(prompt)[0])
        job.llm.engine.check(ids, job.params)
        text = job.llm.target.text
        if len(prompt.turns) > 1 and (job.raw or text is None or not text.has_chat_template):
            raise RequestError("a conversation needs the target's chat template: leave out --raw")
    except RequestError as error:
        raise RequestError(f"prompt {prompt.id}: {error}") from error
    return ids


def _warm_up(job: AnswerJob, baseline: LLM, first_ids: list[list[int]]) -> None:
    """Unmeasured, where methods are timed against each other; else it would only keep the first answer waiting."""
    for llm in (job.llm, baseline):
        llm.engine.prepare(max(map(len, first_ids)) + job.params.max_new_tokens)
        finish(llm.stream_ids(first_ids[0], replace(job.params, max_new_tokens=WARM_UP_TOKENS, stop=())))


@contextmanager
def _sink(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Where records go, each as soon as it exists; FILE itself is only replaced once the run has ended.

    A run that breaks off leaves its records in FILE.partial and an older FILE untouched.
    """
    if path is None:
        yield lambda line: None
        return
    partial = path.with_name(path.name + ".partial")
    with _writing(partial):
        stream = partial.open("w", encoding="utf-8", buffering=1)
    try:
        try:
            yield _writing(partial)(stream.write)
        finally:
            with _writing(partial):
                stream.close()
    except BaseException:
        logger.warning(f"what was answered before is in {partial}")
        raise
    with _writing(partial):
        partial.replace(path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise ConfigError where a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def check_output(path: Path | None) -> None:
    """Raise ConfigError, before minutes of loading, for a file that cannot be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"cannot write {path}: give a file in a folder that exists")


def _answer(job: AnswerJob, index: int) -> Iterator[dict[str, Any]]:
    """One record per turn; each method keeps its own caches between turns."""
    prompt, conversation = job.prompts[index], job.conversation()
    plain_stream = None
    for number, turn in enumerate(_turns(prompt)):
        try:
            stream = conversation.stream(turn, params=job.params_of(index))
        except RequestError as error:
            raise RequestError(f"prompt {prompt.id}, turn {number + 1}: {error}") from error
        for piece in stream:
            if not job.json_lines:
                print(piece, end="", flush=True)
        answer = stream.answer
        record = describe(job.llm, prompt.id, number, answer)
        if job.template:
            record["template"] = job.template
        if job.baseline is not None:
            plain_stream = job.baseline.stream_ids(answer.prompt_ids, answer.params, after=plain_stream)
            record |= compare(job.llm, answer, finish(plain_stream))
        if not job.json_lines:
            print()
            print(summary(record), file=sys.stderr, flush=True)
        yield record


def describe(llm: LLM, name: str | int, turn: int, answer: Answer) -> dict[str, Any]:
    """The record of one answer."""
    return {"id": name, "turn": turn, "target": llm.target.name, "drafter": llm.drafter.name, **_measures(answer)}


def _measures(answer: Answer) -> dict[str, Any]:
    stats: DecodeStats = answer.stats
    return {
        "prompt_tokens": stats.num_prompt_tokens,
        "token_ids": answer.token_ids,
        "text": answer.text,
        "num_tokens": stats.num_tokens,
        "num_steps": stats.num_steps,
        "tau": stats.tau,
        "expected_tau": stats.expected_tau,
        "seconds": stats.seconds,
        "prefill_seconds": stats.prefill_seconds,
        "tokens_per_second": stats.tokens_per_second,
        "finish_reason": str(answer.finish_reason),
        "seed": answer.params.seed,
        **({} if answer.logprobs is None else {"logprobs": [asdict(one) for one in answer.logprobs]}),
    }


def compare(llm: LLM, ours: Answer, plain: Answer) -> dict[str, Any]:
    """Ours against the autoregressive answer to the same prompt, on the same engine and counter."""
    divergence = first_divergence(llm.target, ours.prompt_ids, ours.params, ours.token_ids, plain.token_ids)
    return {
        "baseline": {"target": llm.target.name, "drafter": "none", **_measures(plain)},
        "identical": divergence is None,
        "speedup": _ratio(ours.stats.tokens_per_second, plain.stats.tokens_per_second),
        "decode_speedup": _ratio(ours.stats.decode_tokens_per_second, plain.stats.decode_tokens_per_second),
        "divergence": None
        if divergence is None
        else {"position": divergence.position, "margin": _finite(divergence.margin)},
    }


def _finite(value: float) -> float | None:
    """None for an infinite margin: filters left the target a single token, and JSON has no word for infinity."""
    return value if math.isfinite(value) else None


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def summary(record: dict[str, Any]) -> str:
    """One or three lines for people."""
    lines = [_line(record)]
    if "baseline" in record:
        lines.append(_line(record["baseline"]))
        if record["identical"]:
            same = "the same tokens"
        else:
            at = record["divergence"]
            margin = "none" if at["margin"] is None else f"{at['margin']:.2g}"
            same = f"DIFFERENT tokens from position {at['position']} on (the target's margin there: {margin})"
        faster = "" if record["speedup"] is None else f", {record['speedup']:.2f}x the speed"
        decode = "" if record["decode_speedup"] is None else f" ({record['decode_speedup']:.2f}x without the prompt)"
        lines.append(f"  {'=>':>10} {same}{faster}{decode}")
    return "\n".join(lines)


def summary_of_all(records: Sequence[dict[str, Any]]) -> str:
    """A line about several compared answers: how many are the same, and their tokens a second over the baseline's."""
    same = sum(record["identical"] for record in records)
    ours, plain = (
        _ratio(sum(one["num_tokens"] for one in some), sum(one["seconds"] for one in some))
        for some in (records, [record["baseline"] for record in records])
    )
    faster = "" if (ratio := _ratio(ours, plain)) is None else f", {ratio:.2f}x the speed"
    return f"  {'all':>10} {same} of {len(records)} answers have the same tokens{faster}"


def _line(measures: dict[str, Any]) -> str:
    tau = "" if measures["tau"] is None else f", {measures['tau']:.2f} tokens per target forward"
    if measures["drafter"] != "none" and measures["tau"] is not None:
        tau += f" ({measures['expected_tau']:.2f} expected)"
    speed = measures["tokens_per_second"]
    return (
        f"  {measures['drafter']:>10} {measures['num_tokens']} tokens in {measures['seconds']:.2f} s, "
        f"{speed:.1f} tokens/s{tau} ({measures['finish_reason']})"
    )
