"""Files and folders replaced whole, locks between processes, and "is this the same run?".

After a kill or a power cut a file is the old one or the new one. A lock is given back by the system when its process
ends, however it ends. Windows locks through `msvcrt`; nothing here needs hard links.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from amphista.errors import ConfigError, DataError

log = logging.getLogger(__name__)

NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what file systems without locks answer
SHOWN_CHARACTERS = 40  # of a setting in an error
SHOWN_DIFFERENCES = 5

# -- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose content becomes the file once the block has ended; after an exception the file is as before."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Replace a file whole; text is written as UTF-8 with the line ends it has."""
    with replacing(path) as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file whole; raises ValueError for NaN and infinity, which JSON has no words for."""
    write_file(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises DataError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object")
    return value


def sync_folder(folder: Path) -> None:
    """Put a folder's own entries on disk; Windows cannot open folders and does so by itself."""
    if sys.platform != "win32":
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, how: int) -> None:
    handle = os.open(path, how)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- folders ----------------------------------------------------------------------------------------------------------


def new_folder(folder: Path) -> Path:
    """Where the next content of a folder is put together: an empty folder beside it, for `replace_folder`."""
    fresh = folder.with_name(f".new-{folder.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh


def replace_folder(fresh: Path, folder: Path) -> None:
    """Put `fresh` where `folder` is; the old one is removed once the new one stands."""
    for path in fresh.rglob("*"):  # who wrote them may have left them to the system
        if path.is_file():
            _sync(path, os.O_RDWR)
    sync_folder(fresh)
    old = folder.with_name(f".old-{folder.name}")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(folder.parent)


def recover_folder(folder: Path) -> None:
    """Undo what a kill left of a replacement: the old folder is put back if there is no other, the rest removed."""
    old = folder.with_name(f".old-{folder.name}")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left_over in (old, folder.with_name(f".new-{folder.name}")):
        shutil.rmtree(left_over, ignore_errors=True)


# -- locks ------------------------------------------------------------------------------------------------------------


class Lock:
    """A lock on a path, held by one process at a time; the file stays when the lock is given back.

    with Lock(folder / ".lock", "another process is training into runs/a: wait for its end or give another --out"): ...
    """

    def __init__(self, path: Path, held_by_other: str, *, wait: bool = False) -> None:
        """Take the lock. held_by_other: the sentence of the ConfigError where another has it (unless `wait`)."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("ab")
        except OSError as error:
            raise ConfigError(f"cannot write to {path.parent}: {error.strerror}; give another folder") from error
        try:
            _lock(self._stream, wait=wait)
        except OSError as error:
            if error.errno in NO_LOCKS_HERE:
                log.warning("%s: this file system has no locks: start no second process on this folder", path.parent)
                return
            self._stream.close()
            raise ConfigError(held_by_other) from error

    def release(self) -> None:
        """Give the lock back."""
        self._stream.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


if sys.platform == "win32":
    import msvcrt

    def _lock(stream: IO[bytes], *, wait: bool) -> None:
        stream.seek(0)  # the first byte stands for the file
        msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(stream: IO[bytes], *, wait: bool) -> None:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


# -- the same run? ----------------------------------------------------------------------------------------------------


def check_same_run(what: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming what differs, unless two identities are equal as JSON.

    what: the start of the sentence, for example "runs/a holds another training run". An identity is everything that
    a result depends on: settings, data, target with its type.
    """
    before, now = _flat(there), _flat(json.loads(json.dumps(here)))
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if names:
        differences = [
            f"{n} is {_short(now.get(n))}, there it is {_short(before.get(n))}" for n in names[:SHOWN_DIFFERENCES]
        ]
        more = f"; and {len(names) - SHOWN_DIFFERENCES} more" if len(names) > SHOWN_DIFFERENCES else ""
        raise ConfigError(f"{what}: {'; '.join(differences)}{more}. Give the same settings or another --out")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
