"""Run prompts through one or two methods and print or write what came out: text for people, JSON lines for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amphista.engine.stats import DecodeStats
from amphista.errors import ConfigError, RequestError
from amphista.evaluation.lossless import first_divergence
from amphista.llm import LLM, Answer, finish
from amphista.prompts import PromptRecord

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Job:
    """What to answer, how, and where the records go."""

    llm: LLM
    prompts: list[PromptRecord]
    params: Any
    system: str | None
    raw: bool
    compare: bool
    output: Path | None
    json_lines: bool


def run_job(job: Job) -> None:
    """Check every prompt, warm up, then answer one by one; each record is written as soon as it exists."""
    first_ids = [_prompt_ids(job, prompt, _first_messages(prompt)) for prompt in job.prompts]
    for prompt, ids in zip(job.prompts, first_ids, strict=True):
        _check_length(job, prompt, ids)
    failed = []
    with _sink(job.output) as write:
        for llm in (job.llm, job.llm.baseline) if job.compare else (job.llm,):
            if job.compare:  # else sizes are recorded as they occur: all of them would keep the first answer waiting
                llm.engine.prepare(max(map(len, first_ids)) + job.params.max_new_tokens)
            finish(llm.stream_ids(first_ids[0], replace(job.params, max_new_tokens=WARM_UP_TOKENS, stop=())))
        for prompt in job.prompts:
            try:
                for record in _answer(job, prompt):
                    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
                    if job.json_lines:
                        print(line, flush=True)
                    write(line + "\n")
            except RequestError as error:  # a later turn that no longer fits: the other prompts are still answered
                failed.append(str(error))
                print(f"amphista: {error}", file=sys.stderr, flush=True)
    if failed:
        raise RequestError(f"{len(failed)} of {len(job.prompts)} prompts could not be answered to their end")


@contextmanager
def _sink(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Where records go, each as soon as it exists; FILE itself is only replaced once the run has ended.

    A killed run leaves its records in FILE.partial and an older FILE untouched.
    """
    if path is None:
        yield lambda line: None
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", buffering=1) as stream:
            yield stream.write
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {partial}: {error.strerror}") from error


def check_output(path: Path | None) -> None:
    """Raise ConfigError, before minutes of loading, for a file that cannot be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"cannot write {path}: give a file in a folder that exists")


def _first_messages(prompt: PromptRecord) -> list[dict[str, str]]:
    return prompt.messages or [{"role": "user", "content": prompt.turns[0]}]


def _prompt_ids(job: Job, prompt: PromptRecord, messages: list[dict[str, str]]) -> list[int]:
    if job.raw:
        if prompt.messages or len(prompt.turns) > 1:
            raise RequestError(f"prompt {prompt.id} is a conversation, which needs the chat template: leave out --raw")
        return job.llm.prompt_ids(prompt.turns[0], system=job.system, raw=True)
    text = job.llm.target.text
    if text is not None and not text.has_chat_template:
        if prompt.messages or len(prompt.turns) > 1:
            raise RequestError(f"prompt {prompt.id} is a conversation, but the target has no chat template")
        return job.llm.prompt_ids(prompt.turns[0], system=job.system)
    return job.llm.prompt_ids(messages, system=job.system)


def _check_length(job: Job, prompt: PromptRecord, ids: list[int], turn: int = 0) -> None:
    limit = job.llm.target.spec.max_positions
    if len(ids) > limit:
        where = f"prompt {prompt.id}, turn {turn + 1}," if turn else f"prompt {prompt.id}"
        raise RequestError(
            f"{where} has {len(ids)} tokens, but the target's context holds {job.llm.target.spec.context}: shorten it"
        )
    if not ids:
        raise RequestError(f"prompt {prompt.id} is empty: give some text")


def _answer(job: Job, prompt: PromptRecord) -> Iterator[dict[str, Any]]:
    """One record per turn; each method keeps its own caches between turns."""
    messages = _first_messages(prompt)
    methods = [job.llm, *([job.llm.baseline] if job.compare else [])]
    contexts = [llm.engine.new_context() for llm in methods]
    num_turns = max(1, len(prompt.turns))
    for turn in range(num_turns):
        ids = _prompt_ids(job, prompt, messages)
        _check_length(job, prompt, ids, turn)
        stream = job.llm.stream_ids(ids, job.params, contexts[0])
        for piece in stream:
            if not job.json_lines:
                print(piece, end="", flush=True)
        answer = stream.answer
        record = describe(job.llm, prompt.id, turn, answer)
        if job.compare:
            record |= compare(job.llm, answer, finish(methods[1].stream_ids(ids, job.params, contexts[1])))
        if not job.json_lines:
            print()
            print(summary(record), file=sys.stderr, flush=True)
        yield record
        if turn + 1 < num_turns:
            messages = [
                *messages,
                {"role": "assistant", "content": answer.text},
                {"role": "user", "content": prompt.turns[turn + 1]},
            ]


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


def _line(measures: dict[str, Any]) -> str:
    tau = "" if measures["tau"] is None else f", {measures['tau']:.2f} tokens per target forward"
    if measures["drafter"] != "none" and measures["tau"] is not None:
        tau += f" ({measures['expected_tau']:.2f} expected)"
    speed = measures["tokens_per_second"]
    return (
        f"  {measures['drafter']:>10} {measures['num_tokens']} tokens in {measures['seconds']:.2f} s, "
        f"{speed:.1f} tokens/s{tau} ({measures['finish_reason']})"
    )
