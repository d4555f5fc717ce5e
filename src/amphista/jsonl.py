"""JSON lines, plain or gzipped, read with line numbers."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from amphista.errors import DataError

MAX_LINE = 64 << 20  # bytes


def read_lines(path: Path, on_bad: Callable[[DataError], None] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered JSON objects of a .jsonl or .jsonl.gz file.

    on_bad: told of each line that is none, which is then left out; without it the first one is raised as DataError.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), start=1):
                if len(line) > MAX_LINE:  # a small .gz can hold one without end
                    raise DataError(f"{path} line {number} is longer than {MAX_LINE >> 20} MB")
                try:
                    record = _parse(line, f"{path} line {number}")
                except DataError as error:
                    if on_bad is None:
                        raise
                    on_bad(error)
                    continue
                if record is not None:
                    yield number, record
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or unreadable: {error}") from error


def _parse(line: bytes, where: str) -> dict[str, Any] | None:
    """The object in a line; None for an empty line."""
    try:
        text = line.decode("utf-8-sig" if where.endswith(" line 1") else "utf-8")
        record = json.loads(text) if text.strip() else None
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if record is None and text.strip():
        raise DataError(f"{where} is a JSON null: expected an object")
    if not isinstance(record, dict | None):
        raise DataError(f"{where} is a JSON {type(record).__name__}: expected an object")
    return record
