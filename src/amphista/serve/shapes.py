"""Shapes: answers in OpenAI's form, whole or chunk by chunk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from amphista.serve.answers import (
    Piece,
    TokenTexts,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
    timings,
    usage,
)
from amphista.serve.schema import ChatRequest
from amphista.serve.service import Call
from amphista.target.text import Text


class Shape:
    """How a call's answers are told; `last_words` behind the last chunk."""

    last_words: str | None = "[DONE]"

    def __init__(self, call: Call, text: Text) -> None:
        self._call = call
        self._is_chat = isinstance(call.body, ChatRequest)
        numbers = range(len(call.readers))
        self._echoed = [call.prompts[number // call.body.num_choices] if call.prompts else "" for number in numbers]
        is_first = call.body.tells_prompt or not call.body.goes_on
        self._texts = [TokenTexts(text, is_first=is_first, echoed=echoed) for echoed in self._echoed]
        self._has_begun = [False] * len(call.readers)

    async def whole(self) -> dict[str, Any]:
        """All choices, once they have ended."""
        wholes = [Piece() for _ in self._call.readers]
        for index, piece in await self._call.rest():
            _join(wholes[index], piece)
        kind = "chat.completion" if self._is_chat else "text_completion"
        # those of long prompts, with log-probabilities, take seconds, for which nobody else would be answered
        choices = await asyncio.to_thread(lambda: [self._choice(index, piece) for index, piece in enumerate(wholes)])
        return {**self._head(kind), **self._prompt_ids(), "choices": choices, **self._tail()}

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """Chunks as they come, None where there was nothing to tell for a while."""
        options = self._call.body.stream_options
        has_usage = options is not None and bool(options.include_usage)
        head = self._head("chat.completion.chunk" if self._is_chat else "text_completion")
        if has_usage:
            head["usage"] = None
        once = self._prompt_ids()
        while (pieces := await self._call.pieces()) is not None:
            if not pieces:
                yield None
            for index, piece in pieces:
                told = partial(self._deltas, index, piece)
                is_long = self._call.body.tells_prompt and not self._has_begun[index]  # as in `whole`
                for choice in await asyncio.to_thread(told) if is_long else told():
                    yield {**head, **once, "choices": [choice]}
                    once = {}
        if has_usage:
            yield {**head, "choices": [], **self._tail()}

    def _head(self, kind: str) -> dict[str, Any]:
        call = self._call
        return {"id": call.id, "object": kind, "created": call.created, "model": call.model, "seed": call.seed}

    def _prompt_ids(self) -> dict[str, Any]:
        """Where they are asked for: of the first prompt."""
        return {"prompt_token_ids": self._call.sequences[0].prompt_ids} if self._call.body.return_token_ids else {}

    def _tail(self) -> dict[str, Any]:
        sequences, body = self._call.sequences, self._call.body
        return {"usage": usage(sequences, body.num_choices, is_told=body.num_asked != 0), **timings(sequences)}

    def _deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The role goes first, the reason last and alone."""
        reason, piece.finish_reason = piece.finish_reason, None
        choices, is_first = [], not self._has_begun[index]
        if self._is_chat and is_first:
            delta = {"role": "assistant", "content": ""}
            choices.append({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
        self._has_begun[index] = True
        # the end token, and what was held back with it
        if not piece.is_empty or piece.token_ids or (is_first and self._echoed[index]):
            choices.append(self._choice(index, piece, is_delta=True, is_first=is_first))
        if reason is not None:
            last = {"index": index, "logprobs": None, "finish_reason": reason}
            choices.append({**last, "delta": {}} if self._is_chat else {**last, "text": ""})
        return choices

    def _choice(self, index: int, piece: Piece, *, is_delta: bool = False, is_first: bool = True) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        tells = self._call.body.num_top_logprobs is not None
        if self._is_chat:
            choice["delta" if is_delta else "message"] = _message(piece, is_delta=is_delta)
            ends = self._call.sequences[index].end_ids
            choice["logprobs"] = chat_logprobs(self._texts[index], piece.logprobs, ends) if tells else None
        else:
            choice["text"] = self._echoed[index] * is_first + piece.text
            choice["logprobs"] = self._completion_logprobs(index, piece, is_first=is_first) if tells else None
        choice["finish_reason"] = piece.finish_reason
        if self._call.body.return_token_ids:
            choice["token_ids"] = piece.token_ids
        if piece.steps:
            choice["amphista"] = {"steps": piece.steps, **self._call.traced()}
        return choice

    def _completion_logprobs(self, index: int, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        """Of the prompt first, where it is echoed."""
        texts = self._texts[index]
        if not (is_first and self._call.body.tells_prompt):
            return completion_logprobs(texts, piece.logprobs)
        before = prompt_logprobs(texts, self._call.sequences[index])
        told = completion_logprobs(texts, piece.logprobs)
        return {name: before[name] + told[name] for name in told}


def _message(piece: Piece, *, is_delta: bool) -> dict[str, Any]:
    message: dict[str, Any] = {} if is_delta else {"role": "assistant", "content": None, "refusal": None}
    if piece.text or not (is_delta or piece.tool_calls):
        message["content"] = piece.text
    if piece.reasoning:
        message["reasoning_content"] = piece.reasoning
    if piece.tool_calls:
        message["tool_calls"] = piece.tool_calls if is_delta else [_without_index(call) for call in piece.tool_calls]
    return message


def _without_index(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "index"}


def _join(whole: Piece, piece: Piece) -> None:
    whole.text += piece.text
    whole.reasoning += piece.reasoning
    whole.finish_reason = piece.finish_reason
    for name in ("token_ids", "logprobs", "tool_calls", "steps"):
        getattr(whole, name).extend(getattr(piece, name))


def models(names: Sequence[str], created: int, max_len: int) -> dict[str, Any]:
    """The list of models."""
    return {"object": "list", "data": [model(name, created, max_len) for name in names]}


def model(name: str, created: int, max_len: int) -> dict[str, Any]:
    """One model; vLLM's `max_model_len` is the longest prompt and answer together."""
    return {"id": name, "object": "model", "created": created, "owned_by": "amphista", "max_model_len": max_len}
