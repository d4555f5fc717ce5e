"""Prompts as users bring them: arguments, standard input, JSONL files. A file is checked whole before any decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from amphista.errors import DataError, RequestError
from amphista.jsonl import read_lines


@dataclass(frozen=True)
class PromptRecord:
    """One conversation to hold: user turns one after the other, or messages to answer once."""

    id: str | int
    turns: list[str]
    messages: list[dict[str, str]] | None = None


def from_arguments(prompts: Sequence[str], stdin: TextIO) -> list[PromptRecord]:
    """Command-line prompts; '-' is all of standard input."""
    records = []
    for index, prompt in enumerate(prompts):
        text = _read(stdin) if prompt == "-" else prompt
        if not text.strip():
            raise RequestError(f"prompt {index + 1} is empty: give some text")
        if not is_text(text):
            raise RequestError(f"prompt {index + 1} is not UTF-8 text")
        records.append(PromptRecord(index, [text]))
    return records


def _read(stdin: TextIO) -> str:
    try:
        return stdin.read()
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
        if not isinstance(messages, list) or not messages or not all(is_message(m) for m in messages):
            raise DataError(f"{where}: 'messages' must be a list of objects with texts 'role' and 'content'")
        return PromptRecord(name, [], messages)
    if "prompt" in line:
        if not is_text(line["prompt"]) or not line["prompt"].strip():
            raise DataError(f"{where}: 'prompt' must be a text that is not empty")
        return PromptRecord(name, [line["prompt"]])
    raise DataError(f"{where} has none of 'turns', 'messages', 'prompt' (its keys: {', '.join(line) or 'none'})")


def is_message(message: Any) -> bool:
    """Whether a value is a chat message: an object with the texts `role` and `content`."""
    return isinstance(message, dict) and all(is_text(message.get(key)) for key in ("role", "content"))
