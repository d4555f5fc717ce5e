"""Prompts to be answered: files or a data set of the hub -> conversations without their assistant turns.

A line (or a row of a data set) holds `messages`, `turns` or `prompt`, as everywhere else (`amphista/prompts.py`). One
that cannot be used is left out and counted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amphista.errors import ConfigError, DataError, first_line
from amphista.jsonl import read_lines
from amphista.prompts import prompt_record
from amphista.train.left_out import LeftOut


@dataclass(frozen=True)
class PromptSet:
    """By id what people said in each conversation (user turns, with system messages before or between them), by source
    what identifies its content, and the lines left out."""

    conversations: dict[str, list[dict[str, str]]]
    sources: dict[str, str]
    left_out: LeftOut


def load_conversations(sources: Sequence[str], limit: int | None = None) -> PromptSet:
    """Read files, or data sets named owner/name[:split], whole; `limit` keeps the first so many.

    Lines without an id, or with a number for one, are named after their file. raises DataError for a source of which
    nothing can be used; ConfigError when the package `datasets` would be needed and is missing.
    """
    if not sources:
        raise ConfigError("no prompts: give --prompts FILE (or prompts in the recipe)")
    found: dict[str, list[dict[str, str]]] = {}
    origins: dict[str, str] = {}
    left_out = LeftOut()
    for source in sources:
        name, digest, lines = _open(source, left_out)
        if name in origins:
            raise ConfigError(f"two sources are called {name}: rename one, since conversations are named after it")
        origins[name] = digest
        num_before = len(found)
        for number, line in lines:
            try:
                key, messages = _conversation(line, name, number, f"{source} line {number}")
                if key in found:
                    raise DataError(f"{source} line {number}: the id {key!r} is there twice")
            except DataError as error:
                left_out.add(Path(source), error)
            else:
                found[key] = messages
        if len(found) == num_before:
            raise DataError(f"{source} holds no prompts. {left_out.sentence()}")
    return PromptSet(dict(list(found.items())[:limit]), origins, left_out)


def _open(source: str, left_out: LeftOut) -> tuple[str, str, Iterator[tuple[int, dict[str, Any]]]]:
    """A source's name, what identifies its content, and its numbered lines."""
    path = Path(source).expanduser()
    if path.is_file() or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) or path.suffix in (".jsonl", ".gz"):
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        lines = read_lines(path, lambda error: left_out.add(path, error))
        return path.name, hashlib.sha256(path.read_bytes()).hexdigest(), lines
    return _open_data_set(source)


def _open_data_set(source: str) -> tuple[str, str, Iterator[tuple[int, dict[str, Any]]]]:
    name, _, split = source.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"there is no file {source}, and to read it as a data set of the hub the package datasets is missing: "
            "pip install 'amphista[data]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub, the cache and the readers raise a dozen kinds
        raise DataError(f"cannot load the data set {source}: {first_line(error)}") from error
    return source, str(rows._fingerprint), enumerate((dict(row) for row in rows), start=1)


def _conversation(line: dict[str, Any], source: str, number: int, where: str) -> tuple[str, list[dict[str, str]]]:
    """(id, messages without the assistant's); raises DataError, saying `where`."""
    record = prompt_record(line, where, number)
    name = record.id if isinstance(record.id, str) else f"{source}:{record.id}"
    messages = record.messages or [{"role": "user", "content": turn} for turn in record.turns]
    asked = [message for message in messages if message["role"] != "assistant"]
    if not any(message["role"] == "user" for message in asked):
        raise DataError(f"{where}: conversation {name!r} has no user turn: there is nothing to answer")
    return name, asked
