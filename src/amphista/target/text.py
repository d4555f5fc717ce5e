"""The text side of a target: tokenizer, chat template, and text that appears piece by piece.

Law: the pieces of `IncrementalText`, joined, equal the whole answer decoded at once; no piece ever ends inside a
multi-byte character, and nothing that may still become a stop string is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from amphista.errors import RequestError, TargetError

Message = Mapping[str, str]
REPLACEMENT = "\ufffd"  # what a decoder prints for bytes that are not yet a whole character


class Text:
    """A `transformers` tokenizer seen as prompt renderer and decoder."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return dict(self.tokenizer.get_vocab())

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's own end token."""
        eos_id: int | None = self.tokenizer.eos_token_id
        return eos_id

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens the tokenizer adds by itself."""
        return list(self.tokenizer(text)["input_ids"])

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation in the target's own chat template."""
        return self.encode_part(self.render_text(messages, add_generation_prompt=add_generation_prompt))

    def render_text(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """A conversation in the target's own chat template, as text."""
        if not self.has_chat_template:
            raise TargetError("the target's tokenizer has no chat template: pass plain text (--raw)")
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise whatever their author chose; the sentence is the template's own
            raise RequestError(f"the target's chat template refuses this conversation: {error}") from error
        return text

    def encode_part(self, text: str) -> list[int]:
        """Token ids of rendered text, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode_exactly(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens written out."""
        text: str = self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class IncrementalText:
    """Turns a growing list of token ids into text pieces; ends at the first stop string.

    `push` returns what may be shown now, `finish` the rest. `stopped` is set by the token that completes a stop
    string; the text then excludes the stop string.
    """

    def __init__(self, text: Text, stops: Sequence[str] = ()) -> None:
        self._text, self._stops = text, tuple(stops)
        self._ids: list[int] = []
        self._window_start = 0  # decoding starts here ...
        self._window_end = 0  # ... and everything before here is already in `_decoded`
        self._decoded = ""
        self._num_shown = 0
        self.stopped = False

    @property
    def value(self) -> str:
        """All text so far, shown or held back, without a completed stop string."""
        return self._decoded

    def push(self, token_id: int) -> str:
        """Add one token; the text that is now certain."""
        self._ids.append(token_id)
        before = self._text.decode(self._ids[self._window_start : self._window_end])
        after = self._text.decode(self._ids[self._window_start :])
        if len(after) > len(before) and not after.endswith(REPLACEMENT):
            self._extend(after[len(before) :])
            self._window_start, self._window_end = self._window_end, len(self._ids)
        return self._show(self._num_safe())

    def finish(self) -> str:
        """The rest: bytes that never became a character, and a stop prefix that never completed."""
        if not self.stopped:
            before = self._text.decode(self._ids[self._window_start : self._window_end])
            self._extend(self._text.decode(self._ids[self._window_start :])[len(before) :])
            self._window_start, self._window_end = self._window_end, len(self._ids)
        return self._show(len(self._decoded))

    def _extend(self, piece: str) -> None:
        if self.stopped:
            return
        search_from = max(0, len(self._decoded) - max((len(stop) for stop in self._stops), default=0))
        self._decoded += piece
        found = [at for stop in self._stops if (at := self._decoded.find(stop, search_from)) >= 0]
        if found:
            self.stopped = True
            self._decoded = self._decoded[: min(found)]

    def _num_safe(self) -> int:
        """Characters that no stop string can still swallow."""
        if self.stopped or not self._stops:
            return len(self._decoded)
        longest = max(len(stop) for stop in self._stops)
        for held in range(min(longest - 1, len(self._decoded)), 0, -1):
            tail = self._decoded[-held:]
            if any(stop.startswith(tail) for stop in self._stops):
                return len(self._decoded) - held
        return len(self._decoded)

    def _show(self, end: int) -> str:
        piece = self._decoded[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return piece
