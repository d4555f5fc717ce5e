"""OpenAI's Responses API without a memory: what is asked becomes a chat, what is answered items and events.

Nothing is stored, so a conversation is sent whole each time, the items of earlier answers among it.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from amphista.serve.answers import Piece, TokenTexts, chat_logprobs, timings, usage
from amphista.serve.errors import ApiError
from amphista.serve.schema import (
    MAX_PARTS,
    AnyText,
    Body,
    ChatRequest,
    Few,
    Function,
    GrammarText,
    JsonObject,
    NamedSchema,
    OnlyText,
    Own,
    Refused,
    Whole,
    listed,
)
from amphista.serve.service import Call
from amphista.target.text import Text

TOLD_LOGPROBS = "message.output_text.logprobs"
KINDS = {"message": "output_text", "reasoning": "reasoning_text"}  # of items that hold text, and what their parts are


CHAT_FIELDS = {"max_tokens": "max_output_tokens", "messages": "input", "response_format": "text"}


class InputText(Body):
    type: Annotated[Literal["input_text", "output_text", "text"], OnlyText]
    text: str


Content = str | Annotated[list[InputText], listed(MAX_PARTS)]


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class InputCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputResult(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class InputReasoning(Body):
    """What an earlier answer thought; chat templates leave it out."""

    type: Literal["reasoning"]


def _kind(value: Any) -> str:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", "message")
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Function):
    type: Literal["function"]


class SchemaFormat(NamedSchema):
    type: Literal["json_schema"]


class TextSettings(Body):
    format: Annotated[AnyText | JsonObject | SchemaFormat | GrammarText, Field(discriminator="type")] | None = None


class Reasoning(Body):
    effort: str | None = None


class ResponsesRequest(Body):
    model: str | None = None
    input: str | Annotated[list[Item], listed(MAX_PARTS - 1, 1)]
    instructions: str | None = None
    max_output_tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FunctionTool], listed(128)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[str], listed(16)] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    metadata: Annotated[dict[str, str], Few] | None = None
    prompt_cache_key: str | None = None
    amphista: Own | None = None
    previous_response_id: Refused = None
    conversation: Refused = None
    prompt: Refused = None
    background: Literal[False] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self._messages():
            raise ValueError("input has no message: expected a text, or items of which one is more than a thought")
        return self

    def as_chat(self) -> ChatRequest:
        """The same as a request for a chat."""
        shared = ("model", "temperature", "top_p", "seed", "stream", "tool_choice", "prompt_cache_key", "amphista")
        asked: dict[str, Any] = {name: getattr(self, name) for name in shared}
        if self.tools is not None:
            functions = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in self.tools]
            asked["tools"] = [{"type": "function", "function": function} for function in functions]
        if self.text is not None and self.text.format is not None:
            form = self.text.format.model_dump(by_alias=True, exclude_none=True)
            kind = form.pop("type")
            asked["response_format"] = {"type": kind} | ({kind: form} if kind == "json_schema" else form)
        told = TOLD_LOGPROBS in (self.include or [])
        return ChatRequest(
            **{name: value for name, value in asked.items() if value is not None},
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            logprobs=told,
            top_logprobs=self.top_logprobs if told else None,
        )

    def _messages(self) -> list[Any]:
        """Calls that follow each other are one message's."""
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, InputMessage):
                found.append({"role": item.role, "content": _text(item.content)})
            elif isinstance(item, InputResult):
                found.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
            elif isinstance(item, InputCall):
                if not (found and found[-1].get("tool_calls")):
                    found.append({"role": "assistant", "content": None, "tool_calls": []})
                function = {"name": item.name, "arguments": item.arguments}
                found[-1]["tool_calls"].append({"id": item.call_id, "type": "function", "function": function})
        return found


async def named(starting: Coroutine[Any, Any, Call]) -> Call:
    """The call of a chat; what a refusal names is named as in a response's request."""
    try:
        return await starting
    except ApiError as error:
        error.param = CHAT_FIELDS.get(error.param or "", error.param)
        raise


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ResponseShape:
    """How an answer to a chat is told as a response: items, or named events behind the last of which nothing comes."""

    last_words = None

    def __init__(self, call: Call, text: Text, body: ResponsesRequest) -> None:
        self._call, self._body = call, body
        self._texts = TokenTexts(text, is_first=True)
        self._id = call.id.partition("-")[2]
        self._items: list[dict[str, Any]] = []
        self._open: str | None = None  # the kind of the last item, while text is added to it
        self._numbers = itertools.count()

    async def whole(self) -> dict[str, Any]:
        """The response, once it has ended."""
        self._call.ticket.is_patient = True
        events = [event async for event in self.chunks() if event is not None]
        found: dict[str, Any] = events[-1]["response"]
        return found

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """Its events as they come, None where there was nothing to tell for a while."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))
        reason = None
        while (pieces := await self._call.pieces()) is not None:
            if not pieces:
                yield None
            for _, piece in pieces:
                for event in self._told(piece):
                    yield event
                reason = piece.finish_reason or reason
        status = "incomplete" if reason == "length" else "completed"
        for event in (*([] if self._items else self._more("message", "", Piece())), *self._closed(status)):
            yield event
        yield self._event(f"response.{status}", response=self._response(status))

    def _event(self, kind: str, /, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _response(self, status: str) -> dict[str, Any]:
        body, call, has_ended = self._body, self._call, status != "in_progress"
        form = None if body.text is None else body.text.format
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": call.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": call.model,
            "output": [dict(item) for item in self._items],
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True)},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or []],
            "truncation": "disabled",
            "usage": self._usage() if has_ended else None,
            "seed": call.seed,
            **(timings(call.sequences) if has_ended else {}),
        }

    def _usage(self) -> dict[str, Any]:
        told = usage(self._call.sequences)
        return {
            "input_tokens": told["prompt_tokens"],
            "input_tokens_details": told["prompt_tokens_details"],
            "output_tokens": told["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": told["total_tokens"],
        }

    def _told(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """What is new: thoughts, then text, then calls."""
        if piece.reasoning:
            yield from self._more("reasoning", piece.reasoning)
        if piece.text:
            yield from self._more("message", piece.text, piece)
        for call in piece.tool_calls:
            yield from self._called(call)

    def _more(self, kind: str, text: str, piece: Piece | None = None) -> Iterator[dict[str, Any]]:
        """Text for the item of its kind that is open, or for a new one."""
        if self._open != kind:
            yield from self._closed()
            part: dict[str, Any] = {"type": KINDS[kind], "text": ""}
            item: dict[str, Any] = {"type": kind, "content": [part]}
            if piece is None:
                item["summary"] = []
            else:
                item["role"] = "assistant"
                part |= {"annotations": [], "logprobs": []}
            yield from self._begun(item, "rs" if piece is None else "msg")
            yield self._event("response.content_part.added", **self._place(), part=dict(part))
            self._open = kind
        part, told = self._items[-1]["content"][0], {}
        part["text"] += text
        if piece is not None:
            records, ends = piece.logprobs[piece.num_thought :], self._call.sequences[0].end_ids
            told["logprobs"] = chat_logprobs(self._texts, records, ends)["content"]
            part["logprobs"] += told["logprobs"]
        yield self._event(f"response.{KINDS[kind]}.delta", **self._place(), delta=text, **told)

    def _called(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._closed()
        function = call["function"]
        item = {"type": "function_call", "call_id": call["id"], "name": function["name"], "arguments": ""}
        yield from self._begun(item, "fc")
        place = {name: value for name, value in self._place().items() if name != "content_index"}
        item = self._items[-1]
        item["arguments"] = function["arguments"]
        yield self._event("response.function_call_arguments.delta", **place, delta=item["arguments"])
        named = {"name": item["name"], "arguments": item["arguments"]}
        yield self._event("response.function_call_arguments.done", **place, **named)
        yield self._item_done()

    def _begun(self, item: dict[str, Any], prefix: str) -> Iterator[dict[str, Any]]:
        """A new item, as yet without its content."""
        number = len(self._items)
        self._items.append({"id": f"{prefix}_{self._id}{number}", "status": "in_progress", **item})
        told = self._items[-1] | ({"content": []} if "content" in item else {})
        yield self._event("response.output_item.added", output_index=number, item=told)

    def _closed(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """The end of the item that is open."""
        if self._open is None:
            return
        part, kind, self._open = dict(self._items[-1]["content"][0]), KINDS[self._open], None
        told = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        yield self._event(f"response.{kind}.done", **self._place(), text=part["text"], **told)
        yield self._event("response.content_part.done", **self._place(), part=part)
        yield self._item_done(status)

    def _item_done(self, status: str = "completed") -> dict[str, Any]:
        self._items[-1]["status"] = status
        return self._event("response.output_item.done", output_index=len(self._items) - 1, item=dict(self._items[-1]))

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}
