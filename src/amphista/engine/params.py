"""What a request may say: how to choose tokens, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from amphista.accept.sampling import Sampling
from amphista.errors import RequestError


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # an end token or a stop string
    LENGTH = "length"  # the token limit or the end of the context
    LOOP = "loop"  # it began to repeat itself; only where a batch was asked to cut loops


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Sampling):
    """Sampling settings plus limits. `stop` strings end an answer; the text excludes them.

    ignore_eos: decode on behind end tokens, to `max_new_tokens`: for measuring answers of one length.
    """

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens!r}: expected a whole number, at least 1")
        if not isinstance(self.stop, tuple) or not all(isinstance(stop, str) for stop in self.stop):
            raise RequestError(f"stop is {self.stop!r}: expected a tuple of strings")
        if any(not stop for stop in self.stop):
            raise RequestError("an empty stop string would end every answer at once")
        if type(self.ignore_eos) is not bool:
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}: expected true or false")
