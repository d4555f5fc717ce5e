"""Prompts to be answered: files or a data set of the hub -> conversations without their assistant turns.

A line (or a row of a data set) holds `messages`, `turns` or `prompt`, as everywhere else (`amphista/prompts.py`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from amphista.errors import ConfigError, DataError
from amphista.prompts import PromptRecord, prompt_record, read_prompts


@dataclass(frozen=True)
class Conversation:
    """What people said, in order: user turns, with system messages before or between them."""

    id: str
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class PromptSet:
    """Conversations with distinct ids, and by source what identifies its content."""

    conversations: list[Conversation]
    sources: dict[str, str]


def load_conversations(sources: Sequence[str], limit: int | None = None) -> PromptSet:
    """Read files, or data sets named owner/name[:split], whole; `limit` keeps the first so many.

    Lines without an id, or with a number for one, are named after their file. raises DataError for an unusable line and
    for ids that are not distinct; ConfigError when the package `datasets` would be needed and is missing.
    """
    if not sources:
        raise ConfigError("no prompts: give --prompts FILE (or prompts in the recipe)")
    found: dict[str, Conversation] = {}
    origins: dict[str, str] = {}
    for source in sources:
        name, digest, records = _open(source)
        if name in origins:
            raise ConfigError(f"two sources are called {name}: rename one, since conversations are named after it")
        origins[name] = digest
        for record in records:
            conversation = _conversation(record, name)
            if conversation.id in found:
                raise DataError(f"{source}: the id {conversation.id!r} is there twice: ids must be distinct")
            found[conversation.id] = conversation
    return PromptSet(list(found.values())[:limit], origins)


def _open(source: str) -> tuple[str, str, Iterator[PromptRecord]]:
    """A source's name, what identifies its content, and its records."""
    path = Path(source).expanduser()
    if path.is_file() or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) or path.suffix in (".jsonl", ".gz"):
        records = read_prompts(path)  # says so when there is no such file
        return path.name, hashlib.sha256(path.read_bytes()).hexdigest(), iter(records)
    return _open_data_set(source)


def _open_data_set(source: str) -> tuple[str, str, Iterator[PromptRecord]]:
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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot load the data set {source}: {reason}") from error
    records = (prompt_record(dict(row), f"{source} row {number}", number) for number, row in enumerate(rows, start=1))
    return source, str(rows._fingerprint), records


def _conversation(record: PromptRecord, source: str) -> Conversation:
    name = record.id if isinstance(record.id, str) else f"{source}:{record.id}"
    messages = record.messages or [{"role": "user", "content": turn} for turn in record.turns]
    asked = [message for message in messages if message["role"] != "assistant"]
    if not any(message["role"] == "user" for message in asked):
        raise DataError(f"{source}: conversation {name!r} has no user turn: there is nothing to answer")
    return Conversation(name, asked)
