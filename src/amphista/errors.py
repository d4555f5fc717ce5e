"""The exception tree: every message says what was given, what was expected and what to do.

    AmphistaError
    |-- ConfigError      a setting that cannot be (unknown key, value out of range, unreadable recipe)
    |-- TargetError      a target that cannot be found, loaded or verified as a tree
    |-- DrafterError     a drafter that cannot be found, is damaged, or belongs to another target
    |-- DataError        a prompt or training file with an unusable line, named by its number
    |-- CapacityError    a cache or a context window that is full
    |-- NativeError      the C step, where it cannot be built or used; caught, said, and done without
    |-- QueueFullError   too many requests wait already; says when to try again
    |-- UnavailableError a request that waited too long, or an engine that was closed
    |-- CaptureError     a forward that this device cannot record as a graph; caught, said, and done without
    `-- RequestError     a request that cannot be served (empty prompt, prompt longer than the context)

The command line turns each of them into one sentence on standard error and exit code 2 (`cli/app.py`).
"""

from __future__ import annotations

MOST_OF_REST = 300  # characters of what an error says behind its first line


class AmphistaError(Exception):
    """Base of every error that a user can cause or cure."""


class ConfigError(AmphistaError):
    """A setting is unknown, out of range or contradicts another one."""


class TargetError(AmphistaError):
    """The target cannot be found or loaded, or cannot be verified losslessly."""


class DrafterError(AmphistaError):
    """The drafter cannot be found, is damaged, or was made for another target."""


class DataError(AmphistaError):
    """A data file has a line that cannot be used."""


class CapacityError(AmphistaError):
    """A cache or context window has no room left."""


class NativeError(AmphistaError):
    """The C step cannot be built, loaded or used here."""


class QueueFullError(AmphistaError):
    """Too many requests wait already; `retry_after` is the seconds until they may be done."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(AmphistaError):
    """A request waited too long for its turn, or the engine was closed."""


class CaptureError(AmphistaError):
    """The device cannot record a function as a graph."""


class RequestError(AmphistaError):
    """A request cannot be served as given."""


def first_line(error: BaseException | str) -> str:
    """The first line of what an error says, and those behind it where it ends with a colon, at most 300 characters of
    them; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if not lines[0].endswith(":"):
        return lines[0]
    rest = " ".join(lines[1:])
    return f"{lines[0]} {rest[:MOST_OF_REST]}{'...' * (len(rest) > MOST_OF_REST)}" if rest else lines[0].rstrip(":")
