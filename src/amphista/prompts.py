"""Prompts as users bring them: arguments, standard input, JSONL files. A file is checked whole before any decoding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from amphista.errors import DataError, RequestError
from amphista.jsonl import read_lines

PROMPT_FORMS = "expected a text, a list of messages with 'role' and 'content', or a list of token ids"


@dataclass(frozen=True)
class PromptRecord:
    """One conversation to hold: user turns one after the other, or messages to answer once."""

    id: str | int
    turns: list[str]
    messages: list[dict[str, Any]] | None = None


def from_arguments(prompts: Sequence[str], stdin: TextIO | None) -> list[PromptRecord]:
    """Command-line prompts; '-' is all of standard input, None where it is closed. They count from 0, as in records."""
    records = []
    for index, prompt in enumerate(prompts):
        text = _read(stdin) if prompt == "-" else prompt
        if not text.strip():
            raise RequestError(f"prompt {index} is empty: give some text")
        if not is_text(text):
            raise RequestError(f"prompt {index} is not UTF-8 text")
        records.append(PromptRecord(index, [text]))
    return records


def _read(stdin: TextIO | None) -> str:
    if stdin is None:
        raise RequestError("a prompt is '-', but standard input is closed: pipe a text in, or give the prompt itself")
    try:
        return stdin.read().removeprefix("\ufeff")  # some editors put that mark in front
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: {error}") from error


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be written down: JSON and argument lists may hold lone surrogates."""
    try:
        return isinstance(value, str) and bool(value.encode("utf-8") or True)
    except UnicodeEncodeError:
        return False


def read_prompts(path: Path) -> list[PromptRecord]:
    """A JSONL file with `turns`, `messages` or `prompt` per line; raises DataError naming the first bad line."""
    records = [prompt_record(line, f"{path} line {number}", number) for number, line in read_lines(path)]
    if not records:
        raise DataError(f"{path} holds no prompts")
    return records


def prompt_record(line: dict[str, Any], where: str, number: int) -> PromptRecord:
    """The conversation of one line; `number` is its id where it names none. raises DataError, saying `where`."""
    name = line.get("id", line.get("question_id", number))
    if not isinstance(name, str | int):
        raise DataError(f"{where}: id is {name!r}, expected a string or a number")
    if "turns" in line:
        turns = line["turns"]
        if not isinstance(turns, list) or not turns or not all(is_text(t) and t.strip() for t in turns):
            raise DataError(f"{where}: 'turns' must be a list of one or more texts that are not empty")
        return PromptRecord(name, turns)
    if "messages" in line:
        messages = line["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}: 'messages' must be a list of objects with texts 'role' and 'content'")
        try:
            return PromptRecord(name, [], list(map(plain_message, messages)))
        except RequestError as error:
            raise DataError(f"{where}: 'messages' must be a list of messages: {error}") from error
    if "prompt" in line:
        if not is_text(line["prompt"]) or not line["prompt"].strip():
            raise DataError(f"{where}: 'prompt' must be a text that is not empty")
        return PromptRecord(name, [line["prompt"]])
    raise DataError(f"{where} has none of 'turns', 'messages', 'prompt' (its keys: {', '.join(line) or 'none'})")


def is_message(message: Any) -> bool:
    """Whether a value is a chat message: an object with the texts `role` and `content`."""
    return isinstance(message, dict) and all(is_text(message.get(key)) for key in ("role", "content"))


def plain_message(message: Any) -> dict[str, Any]:
    """A chat message with its text parts joined; raises RequestError for what is none, or more than text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"a message is {message!r}: expected an object with 'role' and 'content'")
    if not re.fullmatch(r"[\w -]+", message["role"]):  # templates build control tokens around it
        raise RequestError(f"a message's role is {message['role']!r}: expected a word, such as user or assistant")
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, list | tuple):
        plain["content"] = "".join(map(_part_text, content))
    elif not isinstance(content, str) and (content is not None or plain.keys() <= {"role", "content"}):  # None: a call
        raise RequestError(f"a message's content is {content!r}: expected a text, or a list of text parts")
    if not all(map(is_text, texts_in(plain))):
        raise RequestError("a message holds half a character (a lone surrogate): it is no text")
    return plain


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(f"a message holds a part of the type {kind!r}: this target reads text alone")


def texts_in(value: Any) -> list[str]:
    """All texts in nested lists and objects, keys included."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return [text for part in value for text in texts_in(part)]
    return [value] if isinstance(value, str) else []


def are_all(prompt: Any, kind: Any) -> bool:
    """Whether this is a list of something, all of one kind."""
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(part, kind) for part in prompt)


def are_prompts(prompt: Any) -> bool:
    """Whether a list holds prompts, not the messages or token ids of one."""
    return are_all(prompt, str | list | tuple)


def only_text(messages: Sequence[Any]) -> str:
    """The text of a single user message; raises RequestError for a conversation."""
    if len(messages) != 1 or messages[0].get("role") != "user" or not isinstance(messages[0].get("content"), str):
        raise RequestError("a conversation needs the target's chat template: give one text, or leave out --raw")
    return str(messages[0]["content"])


def shown(value: Any) -> str:
    """A value in an error, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
