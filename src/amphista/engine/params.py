"""What a request may say: how to choose tokens, and when to stop."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from enum import StrEnum
from typing import Any

from amphista.accept.sampling import Sampling, plain, shown, token_ids
from amphista.errors import RequestError
from amphista.prompts import is_text


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # an end token or a stop string
    LENGTH = "length"  # the token limit or the end of the context
    LOOP = "loop"  # it began to repeat itself; only where a batch was asked to cut loops
    ABORT = "abort"  # its stream was closed
    ERROR = "error"  # it could not go on; `Answer.error` says why


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Sampling):
    """Sampling settings plus limits and what is told.

    max_new_tokens, or max_tokens. stop: texts that end an answer, one or several; the text excludes them.
    stop_token_ids: further end tokens. ignore_eos: decode on behind the target's own end tokens, for measuring answers
    of one length. logprobs: tell each token's log-probability by the target's raw logits, before temperature, filters
    and penalties; a number, or top_logprobs, tells so many of the best tokens beside it.
    """

    max_new_tokens: int = 256
    max_tokens: InitVar[int | None] = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self, max_tokens: int | None) -> None:
        super().__post_init__()
        if max_tokens is not None:
            self._set("max_new_tokens", max_tokens)
        self._set("logprobs", plain(self.logprobs))
        if type(self.logprobs) is int:
            self._set("top_logprobs", self.logprobs)
        elif not isinstance(self.logprobs, bool | None):
            raise RequestError(f"logprobs is {shown(self.logprobs)}: expected true, false or a number of tokens")
        self._set("logprobs", type(self.logprobs) is int or bool(self.logprobs) or self.top_logprobs != 0)
        self._set("stop", _texts(self.stop))
        self._set("stop_token_ids", token_ids("stop_token_ids", self.stop_token_ids))
        for name, least in (("max_new_tokens", 1), ("top_logprobs", 0)):
            value = plain(getattr(self, name))
            if type(value) is not int or value < least:
                raise RequestError(f"{name} is {shown(value)}: expected a whole number, at least {least}")
            self._set(name, value)
        if type(self.ignore_eos) is not bool:
            raise RequestError(f"ignore_eos is {shown(self.ignore_eos)}: expected true or false")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def check_ids(self, vocab_size: int) -> None:
        """Raise RequestError for token ids that a target of so many tokens does not have."""
        for name in ("logit_bias", "suppress_tokens", "stop_token_ids"):
            worst = max(getattr(self, name), default=0)
            if worst >= vocab_size:
                raise RequestError(f"{name} names token id {shown(worst)}; the target has {vocab_size} tokens")
        if self.top_logprobs > vocab_size:
            raise RequestError(f"top_logprobs is {shown(self.top_logprobs)}; the target has {vocab_size} tokens")


def _texts(value: Any) -> tuple[str, ...]:
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise RequestError(f"stop is {shown(value)}: expected a text or a list of texts")
    if any(not stop for stop in stops):
        raise RequestError("an empty stop string would end every answer at once")
    if not all(map(is_text, stops)):
        raise RequestError(f"stop is {shown(value)}: it holds half a character (a lone surrogate)")
    return tuple(stops)
