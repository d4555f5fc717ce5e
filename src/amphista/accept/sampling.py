"""How the target shall choose its next token: penalties, temperature, filters, seed; what of that can be."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from amphista.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose. temperature 0 is greedy; top_k 0 or -1, top_p 1, min_p 0 and the penalties' defaults are off.

    repetition_penalty looks at prompt and output (arXiv 1909.05858, section 4.1), frequency_penalty and
    presence_penalty at the output alone, as in the OpenAI API. logit_bias: {token id: what is added to its logit}.
    suppress_tokens: ids that are never chosen. min_tokens: no token that ends the answer before so many are there.
    seed None: a fresh one for each answer, told in `Answer.params`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    suppress_tokens: tuple[int, ...] = ()
    min_tokens: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value, is_whole = plain(getattr(self, name)), name in WHOLE
            if name == "seed" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int if is_whole else (int, float)):
                raise RequestError(f"{name} is {shown(value)}: expected a{' whole' if is_whole else ''} number")
            if not NUMBERS[name][0](value):
                raise RequestError(f"{name} is {shown(value)}: expected {NUMBERS[name][1]}")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "suppress_tokens", token_ids("suppress_tokens", self.suppress_tokens))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_plain(self) -> bool:
        """Whether logits are taken as they are: no penalty, bias or ban."""
        return (
            (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) == (1, 0, 0)
            and not (self.logit_bias or self.suppress_tokens)
            and self.min_tokens == 0
        )

    @property
    def is_filtered(self) -> bool:
        """Whether tokens of little probability are left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def with_seed(self) -> Self:
        """The same with a seed: its own, or a fresh one."""
        return self if self.seed is not None else replace(self, seed=fresh_seed())


def fresh_seed() -> int:
    """53 bits of the system's entropy: every reader of JSON keeps them whole."""
    return secrets.randbits(53)


def is_finite(value: float) -> bool:
    """Whether a number is one of the floats; a whole one may be too large for that."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Any) -> str:
    """A value for a message; Python writes no number of thousands of digits."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


Check = Callable[[Any], bool]
NUMBERS: dict[str, tuple[Check, str]] = {
    "temperature": (lambda value: is_finite(value) and value >= 0, "0 (greedy) or more"),
    "top_k": (lambda value: value >= -1, "0 or -1 (off) or more"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0 and at most 1 (off)"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 (off) to 1"),
    "repetition_penalty": (lambda value: is_finite(value) and value > 0, "a number above 0; 1 is off"),
    "frequency_penalty": (is_finite, "a finite number; 0 is off"),
    "presence_penalty": (is_finite, "a finite number; 0 is off"),
    "min_tokens": (lambda value: value >= 0, "0 (off) or more"),
    "seed": (lambda value: 0 <= value < 2**64, "an integer from 0 to 2^64 - 1, or none for a fresh one"),
}
WHOLE = ("top_k", "min_tokens", "seed")


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id or several as a tuple; raises RequestError."""
    ids = plain(value)
    ids = (ids,) if type(ids) is int else ids
    if not isinstance(ids, list | tuple | set | frozenset) or not all(type(i) is int and i >= 0 for i in ids):
        raise RequestError(f"{name} is {shown(value)}: expected a list of token ids (whole numbers)")
    return tuple(ids)


def plain(value: Any) -> Any:
    """Arrays, tensors and their numbers as lists and numbers; what is none as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value)) if any(hasattr(part, "tolist") for part in value) else value
    return value.tolist() if hasattr(value, "tolist") else value


def _bias(value: Any) -> dict[int, float]:
    """Token id -> bias; the keys may be strings, as in JSON. raises RequestError."""
    try:
        bias = {int(str(plain(token))): float(added) for token, added in dict(value or {}).items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"logit_bias is {shown(value)}: expected {{token id: number}}") from error
    if any(token < 0 for token in bias) or not all(map(math.isfinite, bias.values())):
        raise RequestError(f"logit_bias is {shown(value)}: expected token ids from 0 and finite numbers")
    return bias
