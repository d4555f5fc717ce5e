"""Measured records in the user's cache folder: one JSON file a key; a damaged one counts as none.

A record that is not good (disturbed while it was measured) serves its process and is not kept, and none is believed
for longer than MAX_AGE_DAYS: neither a bad hour nor a machine that has changed may steer for ever.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amphista.files import write_json
from amphista.target.gguf import cache_folder

logger = logging.getLogger("amphista")

MAX_AGE_DAYS = 30
Record = dict[str, Any]
_not_kept: dict[Path, Record] = {}


def costs_folder() -> Path:
    """Where records are kept."""
    return cache_folder() / "costs"


def path_of(key: Record) -> Path:
    """The file of a record."""
    return costs_folder() / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24] + ".json")


def load_or_measure(
    key: Record, measure: Callable[[], Record], is_good: Callable[[Record], bool], *, refresh: bool
) -> Record:
    """The record under this key; measured where there is none, none that is good, or a fresh one is asked for."""
    key = json.loads(json.dumps(key))  # as it will be read back
    path = path_of(key)
    found = None if refresh else _read(path, key, is_good) or _not_kept.get(path)
    if found is None:
        found = {"key": key, **json.loads(json.dumps(measure()))}
        if is_good(found):
            _not_kept.pop(path, None)
            _write(path, found)
        else:
            _not_kept[path] = found
    return found


def _read(path: Path, key: Record, is_good: Callable[[Record], bool]) -> Record | None:
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        is_old = time.time() - path.stat().st_mtime > MAX_AGE_DAYS * 86400
        return record if record["key"] == key and is_good(record) and not is_old else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _write(path: Path, record: Record) -> None:
    """Replace the file whole; a folder that cannot be written only costs another measurement next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    except OSError as error:
        _not_kept[path] = record
        logger.warning(f"the measured costs cannot be kept in {path.parent} ({error.strerror})")
