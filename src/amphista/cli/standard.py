"""Standard input and output as they come: other encodings than UTF-8, closed pipes, lines from the library's logger."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from amphista.errors import ConfigError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # no defects of ours: the disk takes no more


def is_utf8(stream: Any) -> bool:
    """Whether a stream takes every character; one without an encoding holds text as it is."""
    return codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name == "utf-8"


def prepare() -> None:
    """Write what a stream's encoding lacks as escapes; read bytes that are no text as lone surrogates, which are
    refused by name where they are used, and UTF-8 where the encoding knows no more than ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="surrogateescape")


class _ToStandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed by whoever listened
            print(f"amphista: {record.getMessage()}", file=sys.stderr, flush=True)


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Print what the library logs on standard error while the block runs."""
    logger, handler = logging.getLogger("amphista"), _ToStandardError()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Raise ConfigError where the disk takes no more of a run's folder; the run goes on once it does."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ConfigError(
            f"cannot write {error.filename or f'to {out}'}: {error.strerror}. What was written before is kept: free "
            "some space and give the same command again, it goes on from there"
        ) from error
