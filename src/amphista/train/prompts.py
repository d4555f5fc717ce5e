"""Training text: conversation files and distilled answers -> token rows with their answers marked.

A folder is what `amphista distill` wrote (`distilled.py`). A line of a file is one of
    {"id"?, "prompt_ids": [...], "answer_ids": [...], "temperature"?}    a distilled answer, already token ids
    {"id"?, "messages": [{"role", "content"}, ...]}                      a conversation; its assistant turns are answers

A line that cannot be used is left out and counted. Only what is wrong with a whole file is an error: it cannot be read,
it was made for another target, or none of its lines can be used.

A row holds what the target would see while decoding: the prompt as rendered for generation, then the answer's own
tokens. Most templates mark no answers themselves (`return_assistant_tokens_mask` then gives all zeros with only a
warning), so each conversation is rendered message by message. A template that rewrites history makes a row an answer.
"""

from __future__ import annotations

import logging
import sys
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
from amphista.train.distilled import read_folder, token_rows
from amphista.train.left_out import LeftOut
from amphista.train.token_row import TokenRow, check_ids, cut_row

log = logging.getLogger(__name__)


def read_rows(
    paths: Sequence[Path],
    text: Text | None,
    eos_ids: Collection[int],
    *,
    vocab_size: int,
    max_len: int,
    fingerprint: Fingerprint | None = None,
    left_out: LeftOut | None = None,
) -> list[TokenRow]:
    """All token rows of some files and distillation folders, cut to `max_len` tokens.

    fingerprint: the target's; a folder distilled with another tokenizer is refused. left_out: takes what could not be
    used; without it a warning is logged. An id that was there before (two files that answer the same prompt) becomes
    `id#2`, `id#3`, ... raises DataError for a file that cannot be used.
    """
    rows: list[TokenRow] = []
    seen: Counter[str] = Counter()
    missed = LeftOut() if left_out is None else left_out
    for path in paths:
        for row, where in _rows_in(path, text, eos_ids, fingerprint, missed):
            check_ids(row, where, vocab_size)
            cut = cut_row(row, max_len)
            if any(cut.answers[1:]):  # the first token of all follows nothing
                rows.append(_with_own_id(cut, seen))
            else:
                missed.add(
                    path, f"{where} has no answer tokens within its first {max_len} tokens, or but the very first"
                )
    if not rows:
        raise DataError(f"no answer tokens in {', '.join(map(str, paths))}. {missed.sentence()}")
    if missed.count and left_out is None:
        log.warning("%s", missed.sentence())
    return rows


def _with_own_id(row: TokenRow, seen: Counter[str]) -> TokenRow:
    """The row under an id that no other has; its group stays, and with it its side of the validation split."""
    name = row.id
    while seen[name]:
        seen[row.id] += 1
        name = f"{row.id}#{seen[row.id]}"
    seen[name] += 1
    return replace(row, id=name)


def _rows_in(
    path: Path, text: Text | None, eos_ids: Collection[int], fingerprint: Fingerprint | None, left_out: LeftOut
) -> Iterator[tuple[TokenRow, str]]:
    """Rows and where they stand."""
    if path.is_dir():
        yield from ((row, f"{path} row {row.id!r}") for row in read_folder(path, fingerprint))
        return
    for number, record in read_lines(path, lambda error: left_out.add(path, error)):
        where = f"{path} line {number}"
        if "messages" in record and text is None:
            raise DataError(f"{where} is a conversation, but there is no tokenizer to render it with")
        try:
            rows = _rows_of(record, f"{path.name} line {number}", text, eos_ids)
        except (DataError, RequestError) as error:
            left_out.add(path, f"{where} {error}")
            continue
        yield from ((row, where) for row in rows)


def _rows_of(record: dict[str, Any], default_id: str, text: Text | None, eos_ids: Collection[int]) -> list[TokenRow]:
    """The rows of one line; raises DataError or RequestError, without saying where."""
    name = str(record.get("id", default_id))
    if "answer_ids" in record and "prompt_ids" in record:
        prompt, answer = record["prompt_ids"], record["answer_ids"]
        if not (_are_ids(prompt) and _are_ids(answer)):
            raise DataError("has other things than lists of token ids (whole numbers) as prompt_ids and answer_ids")
        if not answer:
            raise DataError("has no answer tokens")
        temperature = record.get("temperature")
        if temperature is not None and not _is_temperature(temperature):
            raise DataError(f"has the temperature {temperature!r}: expected a finite number, at least 0")
        return token_rows(name, [([*prompt, *answer], [0] * len(prompt) + [1] * len(answer))], temperature)
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages or not all(is_message(m) for m in messages):
            raise DataError("has other things than objects with the texts role and content as messages")
        assert text is not None
        marked = mark_answers(messages, text, eos_ids)
        if not marked:
            raise DataError("has no answer tokens: no turn of it is an assistant's")
        return token_rows(name, marked, None)
    raise DataError(f"has neither prompt_ids and answer_ids nor messages (its keys: {', '.join(record) or 'none'})")


def _is_temperature(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def mark_answers(
    messages: Sequence[Message], text: Text, eos_ids: Collection[int]
) -> list[tuple[list[int], list[int]]]:
    """Render a conversation and mark its assistant turns, end token included: [(token ids, answer numbers)].

    raises DataError for a turn that cannot be marked, RequestError for what the template refuses.
    """
    rows: list[tuple[list[int], list[int]]] = []
    ids: list[int] = []
    marks: list[int] = []
    number = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answer = _split_answer(messages[: index + 1], text)
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


def _split_answer(messages: Sequence[Message], text: Text) -> tuple[list[int], list[int]]:
    """(the generation prompt before the last message, that message) as token ids.

    Rendered at once, tokens may reach across the seam (a prompt's last line break and an answer's first are one token),
    which they cannot do in decoding: then both are made into tokens apart.
    """
    prompt, whole = text.render(messages[:-1]), text.render(messages, add_generation_prompt=False)
    if whole[: len(prompt)] == prompt:
        return prompt, whole[len(prompt) :]
    before, after = text.render_text(messages[:-1]), text.render_text(messages, add_generation_prompt=False)
    if not after.startswith(before):
        raise DataError("has an answer that the chat template does not begin with its generation prompt")
    answer = text.encode_part(after[len(before) :])
    if text.decode_exactly(prompt + answer) != text.decode_exactly(whole):
        raise DataError("has an answer whose tokens, behind the generation prompt, are another text")
    return prompt, answer
