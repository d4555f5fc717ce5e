"""Measured records in the user's cache folder: one JSON file a key, written whole; a damaged one counts as none."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amphista.target.gguf import cache_folder

logger = logging.getLogger("amphista")

Record = dict[str, Any]


def costs_folder() -> Path:
    """Where records are kept."""
    return cache_folder() / "costs"


def path_of(key: Record) -> Path:
    """The file of a record."""
    return costs_folder() / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24] + ".json")


def kept(key: Record, measure: Callable[[], Record], is_whole: Callable[[Record], bool], *, refresh: bool) -> Record:
    """The record under this key; measured and written where there is none, none that is whole, or a fresh one is
    asked for."""
    key = json.loads(json.dumps(key))  # as it will be read back
    path = path_of(key)
    found = None if refresh else _read(path, key, is_whole)
    if found is None:
        found = {"key": key, **json.loads(json.dumps(measure()))}
        _write(path, found)
    return found


def _read(path: Path, key: Record, is_whole: Callable[[Record], bool]) -> Record | None:
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        return record if record["key"] == key and is_whole(record) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, record: Record) -> None:
    """Replace the file whole; a folder that cannot be written only costs another measurement next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(record, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as error:
        logger.warning(f"the measured costs cannot be kept in {path.parent} ({error.strerror})")
