"""Training text: conversation files and distilled answers -> token rows with their answers marked.

A line is one of
    {"id"?, "prompt_ids": [...], "answer_ids": [...], "temperature"?}    a distilled answer, already token ids
    {"id"?, "messages": [{"role", "content"}, ...]}                      a conversation; its assistant turns are answers

Conversations are rendered message by message with a prefix check: most templates mark no answer spans themselves, and
`return_assistant_tokens_mask` then gives all zeros with only a warning. A template that rewrites history makes one row
per answer instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amphista.errors import DataError, RequestError
from amphista.jsonl import read_lines
from amphista.prompts import is_message
from amphista.target.text import Message, Text


@dataclass(frozen=True)
class TokenRow:
    """Token ids and, for each, the number of the answer it belongs to (0: none; an end token belongs to its answer).

    `group` keeps several answers to one prompt on the same side of a train / validation split.
    """

    id: str
    group: str
    token_ids: list[int]
    answers: list[int]
    temperature: float | None = None

    @property
    def num_answer_tokens(self) -> int:
        return sum(1 for answer in self.answers if answer)


def read_rows(
    paths: Sequence[Path], text: Text | None, eos_ids: Collection[int], *, vocab_size: int, max_len: int
) -> list[TokenRow]:
    """All token rows of some files, cut to `max_len` tokens; raises DataError naming file and line."""
    rows: list[TokenRow] = []
    for path in paths:
        for number, record in read_lines(path):
            where = f"{path} line {number}"
            for row in _rows_of(record, where, text, eos_ids):
                _check_row(row, where, vocab_size)
                cut = _cut(row, max_len)
                if cut.num_answer_tokens:
                    rows.append(cut)
    if not rows:
        raise DataError(
            f"no answer tokens in {', '.join(map(str, paths))} within the first {max_len} tokens of any row"
        )
    return rows


def _rows_of(record: dict[str, Any], where: str, text: Text | None, eos_ids: Collection[int]) -> list[TokenRow]:
    name = str(record.get("id", where))
    group = name.split("#")[0]
    if "answer_ids" in record and "prompt_ids" in record:
        prompt, answer = record["prompt_ids"], record["answer_ids"]
        if not (_are_ids(prompt) and _are_ids(answer)):
            raise DataError(f"{where}: prompt_ids and answer_ids must be lists of token ids (whole numbers)")
        marks = [0] * len(prompt) + [1] * len(answer)
        return [TokenRow(name, group, [*prompt, *answer], marks, record.get("temperature"))]
    if "messages" in record:
        if text is None:
            raise DataError(f"{where} is a conversation, but there is no tokenizer to render it with")
        messages = record["messages"]
        if not isinstance(messages, list) or not messages or not all(is_message(m) for m in messages):
            raise DataError(f"{where}: 'messages' must be a list of objects with texts 'role' and 'content'")
        try:
            marked = mark_answers(messages, text, eos_ids)
        except (DataError, RequestError) as error:
            raise DataError(f"{where}: {error}") from error
        if not marked:
            raise DataError(f"{where} has no answer tokens: give it an assistant turn, or leave the line out")
        return [TokenRow(f"{name}/{i}" if i else name, group, ids, marks) for i, (ids, marks) in enumerate(marked)]
    raise DataError(f"{where} has neither prompt_ids and answer_ids nor messages (its keys: {', '.join(record)})")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def mark_answers(
    messages: Sequence[Message], text: Text, eos_ids: Collection[int]
) -> list[tuple[list[int], list[int]]]:
    """Render a conversation and mark its assistant turns, end token included: [(token ids, answer numbers)]."""
    rows: list[tuple[list[int], list[int]]] = []
    ids: list[int] = []
    marks: list[int] = []
    number = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = text.render(messages[:index])
        whole = text.render(messages[: index + 1], add_generation_prompt=False)
        if whole[: len(prompt)] != prompt:
            raise DataError(
                "the chat template does not start an answer with its generation prompt: cannot mark answers"
            )
        answer = whole[len(prompt) :]
        end = next((i + 1 for i, token in enumerate(answer) if token in eos_ids), len(answer))
        if prompt[: len(ids)] != ids and ids:  # the template rewrote what came before: start a row of its own
            rows.append((ids, marks))
            ids, marks, number = [], [], 0
        number += 1
        marks = marks + [0] * (len(prompt) - len(ids)) + [number] * end
        ids = prompt + answer[:end]
    if ids:
        rows.append((ids, marks))
    return rows


def _check_row(row: TokenRow, where: str, vocab_size: int) -> None:
    if not row.num_answer_tokens:
        raise DataError(f"{where} has no answer tokens: give it an assistant turn, or leave the line out")
    worst = max(row.token_ids)
    if worst >= vocab_size or min(row.token_ids) < 0:
        raise DataError(
            f"{where} holds token id {worst}, but the target has {vocab_size} tokens: made for another target?"
        )


def _cut(row: TokenRow, max_len: int) -> TokenRow:
    if len(row.token_ids) <= max_len:
        return row
    return TokenRow(row.id, row.group, row.token_ids[:max_len], row.answers[:max_len], row.temperature)
