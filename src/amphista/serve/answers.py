"""Answers: what a request's updates mean to its reader, piece by piece; the engine knows ids, text is made here."""

from __future__ import annotations

import codecs
import json
import math
import secrets
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from amphista.accept.logprobs import TokenLogprob
from amphista.engine.loop import Update
from amphista.engine.params import FinishReason
from amphista.engine.request import State
from amphista.engine.sequence import Sequence as Decoded
from amphista.engine.step import StepResult
from amphista.errors import UnavailableError
from amphista.target.text import THOUGHTS, IncrementalText, Text

MAX_TOLD_NODES = 64


@dataclass
class Piece:
    """What is new of an answer; joined where its reader was slow."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    reasoning: str = ""
    num_thought: int = 0  # the first so many of `logprobs` belong to thoughts
    steps: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell yet."""
        return not (self.text or self.tool_calls or self.reasoning or self.steps or self.finish_reason)


class Reader:
    """Reads one answer by its `reader`. parser: finds calls of tools and reasoning in its text (`transformers`'
    ResponseParser); what it cannot read is told as it is."""

    def __init__(self, text: Text, sequence: Decoded, reader: IncrementalText, parser: Any = None) -> None:
        self.sequence, self._text, self._reader, self._parser = sequence, text, reader, parser
        self._num_calls = 0
        self._parsed, self._num_told = "", 0  # what the parser was given, and how much of that was told
        self._held = Piece()  # tokens that are not yet a whole character
        self.has_ended = False

    def read(self, updates: Sequence[Update]) -> Piece:
        """What these updates add; empty until there is something to show. raises the error of an answer that failed."""
        piece, ends = self._held, self.sequence.end_ids
        results = [update.result for update in updates if isinstance(update.result, StepResult)]
        is_plain = self._parser is None and not self.sequence.is_traced  # nobody asks which token a text is of
        for result in results:
            piece.token_ids += result.token_ids
            if is_plain:
                piece.logprobs += result.logprobs
            else:
                self._take(result, piece)
        if is_plain:
            token_ids = [token for result in results for token in result.token_ids if token not in ends]
            piece.text += self._reader.push_all(token_ids)
        if updates and updates[-1].state.has_ended:
            self._end(updates[-1], piece)
        if piece.is_empty:
            return Piece()
        self._held = Piece()
        return piece

    def _take(self, result: StepResult, piece: Piece) -> None:
        """Its text, token by token."""
        ends = self.sequence.end_ids
        texts = ["" if token in ends else self._reader.push(token) for token in result.token_ids]
        for number, text in enumerate(texts):
            piece.logprobs += result.logprobs[number : number + 1]
            self._add(text, piece)
        if self.sequence.is_traced:
            pairs = zip(texts, result.sources, strict=True)
            told = [{"text": text, "source": source.value} for text, source in pairs]
            piece.steps.append({"tokens": told, **self._tree(result)})

    def _tree(self, result: StepResult) -> dict[str, Any]:
        trace = result.trace
        if trace is None:  # the end of the prompt
            return {"nodes": [], "path": [], "ms": 0.0}
        columns = (trace.tree.tokens, trace.tree.parents, trace.scores, trace.sources)
        nodes = [
            {
                "text": self._text.decode_exactly([token]),
                "parent": parent,
                "p": round(math.exp(score), 4),
                "source": who,
            }
            for token, parent, score, who in list(zip(*columns, strict=True))[:MAX_TOLD_NODES]
        ]
        return {"nodes": nodes, "path": trace.path, "ms": round(1000 * trace.seconds, 2)}

    def _end(self, update: Update, piece: Piece) -> None:
        self.has_ended = True
        if update.error is not None:
            raise update.error
        if update.state is State.CANCELLED:
            raise UnavailableError("the request was cancelled")
        self._add(self._reader.finish(), piece)
        if self._parser is not None:
            self._parse(lambda: self._parser.finalize()[1], piece)
        reason = self.sequence.finish_reason
        piece.finish_reason = "length" if reason is FinishReason.LENGTH else "stop"
        if self._num_calls and piece.finish_reason == "stop":
            piece.finish_reason = "tool_calls"

    def _add(self, text: str, piece: Piece) -> None:
        if self._parser is None:
            piece.text += text
        elif text:
            self._parsed += text
            self._parse(lambda: self._parser.feed(text), piece)

    def _parse(self, parse: Callable[[], list[dict[str, Any]]], piece: Piece) -> None:
        """Note what the parser finds; a call that is none, or was cut off, is text like all that follows."""
        try:
            self._note_events(parse(), piece)
        except Exception:  # whatever a template's forms make of what a model writes
            piece.text += self._parsed[self._num_told :]
            self._parser = None

    def _note_events(self, events: list[dict[str, Any]], piece: Piece) -> None:
        """A call is told once it is whole; text and reasoning as they come."""
        for event in events:
            if event["type"] == "region_close" and event["field"] == "tool_calls":
                piece.tool_calls += self._calls(event["value"])
                self._num_told = len(self._parsed)
            elif event["type"] == "region_chunk" and event["field"] == "content":
                piece.text += event["text"]
                self._note_told(event["text"])
            elif event["type"] == "region_chunk" and event["field"] in THOUGHTS:
                piece.reasoning += event["text"]
                self._note_told(event["text"])
            elif event["type"] == "region_close" and event["field"] in THOUGHTS:
                piece.num_thought = len(piece.logprobs)

    def _note_told(self, text: str) -> None:
        """Told is what was parsed, to the end of this text: nothing but marks lies before it."""
        at = self._parsed.find(text, self._num_told)
        self._num_told = max(self._num_told, at + len(text))

    def _calls(self, value: Any) -> list[dict[str, Any]]:
        """raises what shows that a value is no call, or not a list of some."""
        calls: list[dict[str, Any]] = []
        for function in _functions(value):
            arguments = function.get("arguments", {})
            told = arguments if isinstance(arguments, str) else json.dumps(arguments)
            call = {"index": self._num_calls + len(calls), "id": f"call_{secrets.token_hex(12)}", "type": "function"}
            calls.append(call | {"function": {"name": function["name"], "arguments": told}})
        self._num_calls += len(calls)
        return calls


def _functions(value: Any) -> list[dict[str, Any]]:
    """Each that is called, with its name."""
    if isinstance(value, list):
        return [function for one in value for function in _functions(one)]
    if isinstance(value, dict) and "function" in value:
        return _functions(value["function"])
    function = {"name": value} if isinstance(value, str) else value
    if not function["name"] or not isinstance(function["name"], str):
        raise ValueError("a call without a name")
    return [function]


class TokenTexts:
    """Tokens of one text, told one after the other: what each stands for, and where it begins.

    is_first: whether the next one begins the text; some decoders leave out the space before that one. echoed: what is
    shown before the answer; control tokens are shown nowhere else.
    """

    def __init__(self, text: Text, *, is_first: bool, echoed: str = "") -> None:
        self._text, self._is_first, self._echoed, self._end = text, is_first, echoed, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # characters may be of several tokens

    def bytes_of(self, token_id: int) -> bytes:
        """What the next token stands for, if it is this one."""
        return self._text.token_bytes(token_id, is_first=self._is_first)

    def name(self, token_id: int) -> str:
        """The same as text."""
        return self.bytes_of(token_id).decode(errors="replace")

    def passed(self, token_id: int) -> int:
        """Go on behind this token; how many characters of text stand before it."""
        held, begin = self.bytes_of(token_id), self._end
        if token_id in self._text.special_ids:
            name = held.decode()
            self._end += len(name) * self._echoed.startswith(name, begin)
            return begin
        if held and not 0x80 <= held[0] < 0xC0:  # it goes on with no character: one that was begun has come to nothing
            begin += len(self._decoder.decode(b"", final=True))
        self._end, self._is_first = begin + len(self._decoder.decode(held)), False
        return begin


def chat_logprobs(texts: TokenTexts, records: Sequence[TokenLogprob], ends: Container[int]) -> dict[str, Any]:
    """As chat completions tell them: without the token that ends an answer."""

    def told(token_id: int, logprob: float) -> dict[str, Any]:
        held = texts.bytes_of(token_id)
        return {"token": held.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(held)}

    content = []
    for record in records:
        if record.token_id in ends:
            continue
        best = [told(*other) for other in record.top.items()]
        content.append({**told(record.token_id, record.logprob), "top_logprobs": best})
        texts.passed(record.token_id)
    return {"content": content}


def completion_logprobs(texts: TokenTexts, records: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As completions tell them, the token that ends an answer among them: who scores an end needs it. Of tokens with
    the same name the best is told, the chosen one with the others."""
    told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for record in records:
        tops: dict[str, float] = {}
        for token_id, logprob in record.top.items():
            tops.setdefault(texts.name(token_id), _finite(logprob))
        tops.setdefault(texts.name(record.token_id), _finite(record.logprob))
        told["tokens"].append(texts.name(record.token_id))
        told["token_logprobs"].append(_finite(record.logprob))
        told["top_logprobs"].append(tops)
        told["text_offset"].append(texts.passed(record.token_id))
    return told


def prompt_logprobs(texts: TokenTexts, sequence: Decoded) -> dict[str, Any]:
    """Of a prompt that was asked about, as completions tell them: nothing is known of its first token."""
    first = TokenLogprob(sequence.token_ids[0], 0.0, {})
    told = completion_logprobs(texts, [first, *(sequence.prompt_logprobs or [])])
    told["token_logprobs"][0] = told["top_logprobs"][0] = None
    return told


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -9999.0)


def usage(sequences: Sequence[Decoded], num_choices: int = 1, *, is_told: bool = True) -> dict[str, Any]:
    """Tokens of all answers, `num_choices` to each prompt, which have read it once. is_told: whether answers are."""
    firsts = sequences[::num_choices]
    num_prompt = sum(sequence.num_prompt for sequence in firsts)
    num_output = sum(sequence.num_output for sequence in sequences) if is_told else 0
    num_cached = sum(sequence.stats.num_cached_tokens for sequence in firsts)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def timings(sequences: Sequence[Decoded]) -> dict[str, Any]:
    """llama.cpp's `timings` and what became of drafts; sums over the choices."""
    all_stats = [sequence.stats for sequence in sequences]
    num_cached = sum(stats.num_cached_tokens for stats in all_stats)
    num_read = sum(stats.num_prompt_tokens for stats in all_stats) - num_cached
    num_decoded = sum(stats.num_tokens for stats in all_stats)
    prompt_ms = 1000 * sum(stats.prefill_seconds for stats in all_stats)
    decode_ms = 1000 * sum(stats.decode_seconds for stats in all_stats)
    num_steps = sum(stats.num_steps for stats in all_stats)
    accepted = sum(sum(stats.accepted) for stats in all_stats)
    drafted = sum(sum(stats.tree_nodes) for stats in all_stats) - num_steps
    return {
        "timings": {
            "cache_n": num_cached,
            "prompt_n": num_read,
            "prompt_ms": round(prompt_ms, 3),
            "predicted_n": num_decoded,
            "predicted_ms": round(decode_ms, 3),
            "predicted_per_second": round(1000 * num_decoded / decode_ms, 3) if decode_ms else None,
            "draft_n": drafted,
            "draft_n_accepted": accepted,
        },
        "metrics": {
            "speculative_decoding": {
                "num_steps": num_steps,
                "num_drafts": sum(sum(nodes > 1 for nodes in stats.tree_nodes) for stats in all_stats),
                "num_draft_tokens": drafted,
                "num_accepted_tokens": accepted,
                "mean_acceptance_length": round(1 + accepted / num_steps, 4) if num_steps else None,
            }
        },
    }
