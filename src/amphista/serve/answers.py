"""Answers: what a request's updates mean to its reader, piece by piece; the engine knows ids, text is made here."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from amphista.accept.logprobs import TokenLogprob
from amphista.engine.loop import Update
from amphista.engine.params import FinishReason
from amphista.engine.request import State
from amphista.engine.sequence import Sequence as Decoded
from amphista.engine.step import StepResult
from amphista.errors import UnavailableError
from amphista.target.text import IncrementalText, Text

MAX_TOLD_NODES = 64


@dataclass
class Piece:
    """What is new of an answer; joined where its reader was slow."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    reasoning: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell yet."""
        return not (self.text or self.tool_calls or self.reasoning or self.steps or self.finish_reason)


class Reader:
    """Reads one answer. parser: finds calls of tools and reasoning in its text (`transformers`' ResponseParser)."""

    def __init__(self, text: Text, sequence: Decoded, parser: Any = None) -> None:
        self.sequence, self._text, self._parser = sequence, text, parser
        params = sequence.params
        self._reader = IncrementalText(text, params.stop, params.min_tokens, shows_special=parser is not None)
        self._num_calls = 0
        self._held = Piece()  # tokens that are not yet a whole character
        self.has_ended = False

    def read(self, updates: Sequence[Update]) -> Piece:
        """What these updates add; empty until there is something to show. raises the error of an answer that failed."""
        piece = self._held
        for update in updates:
            if isinstance(update.result, StepResult):
                self._take(update.result, piece)
            if update.state.has_ended:
                self._end(update, piece)
        if piece.is_empty:
            return Piece()
        self._held = Piece()
        return piece

    def _take(self, result: StepResult, piece: Piece) -> None:
        ends = self.sequence.end_ids
        texts = ["" if token in ends else self._reader.push(token) for token in result.token_ids]
        self._add("".join(texts), piece)
        piece.token_ids += result.token_ids
        piece.logprobs += [record for record in result.logprobs if record.token_id not in ends]
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
            self._note_events(self._parser.finalize()[1], piece)
        reason = self.sequence.finish_reason
        piece.finish_reason = "length" if reason is FinishReason.LENGTH else "stop"
        if self._num_calls and piece.finish_reason == "stop":
            piece.finish_reason = "tool_calls"

    def _add(self, text: str, piece: Piece) -> None:
        if self._parser is None:
            piece.text += text
        elif text:
            self._note_events(self._parser.feed(text), piece)

    def _note_events(self, events: list[dict[str, Any]], piece: Piece) -> None:
        """A call is told once it is whole; text and reasoning as they come."""
        for event in events:
            if event["type"] == "region_close" and event["field"] == "tool_calls":
                values = event["value"] if isinstance(event["value"], list) else [event["value"]]
                piece.tool_calls += [self._call(value) for value in values]
            elif event["type"] == "region_chunk" and event["field"] == "content":
                piece.text += event["text"]
            elif event["type"] == "region_chunk" and event["field"] in ("reasoning_content", "thinking"):
                piece.reasoning += event["text"]

    def _call(self, value: Any) -> dict[str, Any]:
        function = value.get("function", value) if isinstance(value, dict) else {}
        arguments = function.get("arguments", {})
        self._num_calls += 1
        return {
            "index": self._num_calls - 1,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {
                "name": str(function.get("name", "")),
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
            },
        }


def chat_logprobs(text: Text, records: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As chat completions tell them."""

    def told(token_id: int, logprob: float) -> dict[str, Any]:
        held = text.token_bytes(token_id)
        return {"token": held.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(held)}

    return {
        "content": [
            {**told(record.token_id, record.logprob), "top_logprobs": [told(*best) for best in record.top.items()]}
            for record in records
        ]
    }


def completion_logprobs(text: Text, records: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """As completions tell them; offset: characters before the first token."""
    names, offsets = [], []
    for record in records:
        names.append(text.decode_exactly([record.token_id]))
        offsets.append(offset)
        offset += len(names[-1])
    tops = [{text.decode_exactly([token]): _finite(value) for token, value in r.top.items()} for r in records]
    return {
        "tokens": names,
        "token_logprobs": [_finite(record.logprob) for record in records],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_logprobs(text: Text, sequence: Decoded) -> dict[str, Any]:
    """Of a prompt that was asked about, as completions tell them: nothing is known of its first token."""
    first = TokenLogprob(sequence.token_ids[0], 0.0, {})
    told = completion_logprobs(text, [first, *(sequence.prompt_logprobs or [])], 0)
    told["token_logprobs"][0] = told["top_logprobs"][0] = None
    return told


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -9999.0)


def usage(sequences: Sequence[Decoded]) -> dict[str, Any]:
    """Tokens of all choices; the answers to one prompt have read it once."""
    prompts = {tuple(sequence.prompt_ids): sequence for sequence in reversed(sequences)}
    num_prompt = sum(sequence.num_prompt for sequence in prompts.values())
    num_output = sum(sequence.num_output for sequence in sequences)
    num_cached = sum(sequence.stats.num_cached_tokens for sequence in prompts.values())
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
