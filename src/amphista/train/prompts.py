"""Training text: conversation files and distilled answers -> token rows with their answers marked.

A folder is what `amphista distill` wrote (`shards.py`). A line of a file is one of
    {"id"?, "prompt_ids": [...], "answer_ids": [...], "temperature"?}    a distilled answer, already token ids
    {"id"?, "messages": [{"role", "content"}, ...]}                      a conversation; its assistant turns are answers

Conversations are rendered message by message with a prefix check: most templates mark no answer spans themselves, and
`return_assistant_tokens_mask` then gives all zeros with only a warning. A template that rewrites history makes one row
per answer instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from amphista.errors import DataError, RequestError
from amphista.jsonl import read_lines
from amphista.prompts import is_message
from amphista.target.spec import Fingerprint
from amphista.target.text import Message, Text
from amphista.train.rows import TokenRow, check_row, cut_row, group_of
from amphista.train.shards import read_folder


def read_rows(
    paths: Sequence[Path],
    text: Text | None,
    eos_ids: Collection[int],
    *,
    vocab_size: int,
    max_len: int,
    fingerprint: Fingerprint | None = None,
) -> list[TokenRow]:
    """All token rows of some files and distillation folders, cut to `max_len` tokens.

    fingerprint: the target's; a folder distilled with another tokenizer is refused. An id that was there before (two
    files that answer the same prompt) becomes `id#2`, `id#3`, ... raises DataError naming file and line.
    """
    rows: list[TokenRow] = []
    seen: Counter[str] = Counter()
    for path in paths:
        for row, where in _rows_in(path, text, eos_ids, fingerprint):
            check_row(row, where, vocab_size)
            cut = cut_row(row, max_len)
            if cut.num_answer_tokens:
                rows.append(_told_apart(cut, seen))
    if not rows:
        raise DataError(
            f"no answer tokens in {', '.join(map(str, paths))} within the first {max_len} tokens of any row"
        )
    return rows


def _told_apart(row: TokenRow, seen: Counter[str]) -> TokenRow:
    """The row under an id that no other has; its group stays, and with it its side of the validation split."""
    name = row.id
    while seen[name]:
        seen[row.id] += 1
        name = f"{row.id}#{seen[row.id]}"
    seen[name] += 1
    return replace(row, id=name)


def _rows_in(
    path: Path, text: Text | None, eos_ids: Collection[int], fingerprint: Fingerprint | None
) -> Iterator[tuple[TokenRow, str]]:
    """Rows and where they stand."""
    if path.is_dir():
        yield from ((row, f"{path} row {row.id!r}") for row in read_folder(path, fingerprint))
        return
    for number, record in read_lines(path):
        where = f"{path} line {number}"
        yield from ((row, where) for row in _rows_of(record, where, text, eos_ids))


def _rows_of(record: dict[str, Any], where: str, text: Text | None, eos_ids: Collection[int]) -> list[TokenRow]:
    name = str(record.get("id", where))
    group = group_of(name)
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
