"""Grammars: what an answer must look like, by llguidance, over the target's own tokens.

A matcher follows the target's own choices, one after the other, as plain decoding would make them; drafts never reach
it. So it is asked for a mask only at nodes that the target visits, and nothing about it depends on a drafter or tree.
Where it leaves no choice it drafts itself: brackets and names of a schema cost no forward of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import llguidance.hf
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from amphista.errors import RequestError, first_line
from amphista.target.target import Target

MAX_BYTES = 64 * 1024
MAX_ITEMS = 5000  # of a step: where a form may be read in many ways, each further token would take longer
SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Matched:
    """One answer's grammar (`accept.sampling.Grammar`). Behind its end only end tokens are allowed: a drafted path may
    go on there, which nobody will see."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._tokens: list[int] = []
        self._num_consumed = 0

    def allowed(self, index: int) -> NDArray[np.bool_]:
        """Which tokens [V] may be number `index` of the answer."""
        self._go_to(index)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise RequestError(f"response_format cannot be followed: {first_line(self._matcher.get_error())}")
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(bool)

    def forced(self, index: int) -> list[int]:
        """The tokens that the tokenizer would make of the characters about which there is no choice."""
        self._go_to(index)
        return list(self._matcher.compute_ff_tokens())

    def chose(self, index: int, token: int) -> None:
        """Token number `index` was chosen."""
        self._forget(index)
        self._tokens.append(token)

    def _go_to(self, index: int) -> None:
        self._forget(index)
        for token in self._tokens[self._num_consumed :]:
            self._matcher.consume_token(token)
            self._num_consumed += 1

    def _forget(self, index: int) -> None:
        """What was chosen at `index` and behind it."""
        if self._num_consumed > index:
            self._matcher.rollback(self._num_consumed - index)
            self._num_consumed = index
        del self._tokens[index:]


class Grammars:
    """Makes matchers for the tokens of one target; the first takes some tenths of a second more."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def compiled(self, response_format: dict[str, Any]) -> Callable[[], Matched] | None:
        """Makes one matcher for each answer; None where any text will do. raises RequestError."""
        grammar = _grammar(response_format)
        if grammar is None:
            return None
        if len(grammar.encode()) > MAX_BYTES:
            raise RequestError(f"response_format: the grammar is too long, expected at most {MAX_BYTES // 1024} KiB")
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(step_max_items=MAX_ITEMS))
        if matcher.is_error():
            raise RequestError(f"response_format: {first_line(matcher.get_error())}")
        return lambda: Matched(matcher.deep_copy(), self._target.spec.vocab_size)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        assert self._target.text is not None, "the server needs a tokenizer"
        ends = sorted(self._target.eos_ids)
        try:
            return llguidance.hf.from_tokenizer(
                self._target.text.tokenizer, n_vocab=self._target.spec.vocab_size, eos_token=ends
            )
        except ValueError as error:
            raise RequestError(f"response_format: this target's tokenizer cannot be used for it: {error}") from error


def _grammar(response_format: dict[str, Any]) -> str | None:
    """In llguidance's own form."""
    kind = response_format["type"]
    if kind == "text":
        return None
    if kind == "grammar":
        definition = response_format["definition"]
        is_regex = response_format["syntax"] == "regex"
        return LLMatcher.grammar_from_regex(definition) if is_regex else LLMatcher.grammar_from_lark(definition)
    asked = response_format["json_schema"].get("schema") if kind == "json_schema" else None
    schema = {"type": "object"} if asked is None else asked
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=SPACING)
    except ValueError as error:
        raise RequestError(f"response_format: {first_line(error)}") from error
