"""The text side of a target: tokenizer, chat template, and text that appears piece by piece.

Law: the pieces of `IncrementalText`, joined, equal the whole answer decoded at once; no piece ever ends inside a
multi-byte character, and nothing that may still become a stop string is shown. A conversation's texts are texts: the
only control tokens in a rendered prompt are those that the chat template itself writes.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from amphista.errors import RequestError, TargetError
from amphista.prompts import is_text, plain_message, texts_in

Message = Mapping[str, Any]
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that stand for themselves in names
BYTES = {chr(byte): byte for byte in PRINTABLE}  # of byte-level tokens (GPT-2's), by the characters of their names
BYTES |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)}
THOUGHTS = ("reasoning_content", "thinking")  # fields of an answer, as templates name them
REPLACEMENT = "\ufffd"  # what a decoder prints for bytes that are not yet a whole character
MAX_OPEN = 16  # tokens that may wait for a character to end; none has more than 4 bytes
CHARACTER_BYTES = 4
NO_VARIABLES = frozenset(
    {"self", "conversation", "messages", "tokenize"}
)  # and what begins with `return_`: arguments, not of a template


class Text:
    """A `transformers` tokenizer seen as prompt renderer and decoder."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return dict(self.tokenizer.get_vocab())

    @cached_property
    def _known_ids(self) -> frozenset[int]:
        return frozenset(self.vocabulary.values())

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that are no text, and their ids."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {token.content: token_id for token_id, token in added if token.special and not self.decode([token_id])}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @cached_property
    def byte_tokens(self) -> dict[int, int]:
        """Ids and values of the tokens that stand for single bytes, where a run of them that is not UTF-8 is decoded to
        nothing but replacements (byte fallback): what comes later then changes what came before."""
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        found = {self.vocabulary[name]: byte for name, byte in names.items() if name in self.vocabulary}
        broken = [self.vocabulary.get(f"<0x{byte:02X}>", -1) for byte in (*"é".encode(), 0xFF)]
        return found if -1 not in broken and self.decode(broken) == REPLACEMENT * 3 else {}

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's own end token."""
        eos_id: int | None = self.tokenizer.eos_token_id
        return eos_id

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens the tokenizer adds by itself; raw: control tokens in it are
        control tokens."""
        if not is_text(text):
            raise RequestError("the prompt holds half a character (a lone surrogate): it is no text")
        return list(self.tokenizer(text)["input_ids"])

    def render(
        self, messages: Sequence[Message], /, *, add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> list[int]:
        """Token ids of a conversation in the target's own chat template; `template_kwargs` are its variables.

        What the messages hold is encoded as text, control tokens too. raises RequestError for messages that are none,
        for what the template refuses, and for control tokens where this transformers cannot take them as text.
        """
        if taken := [name for name in template_kwargs if name in NO_VARIABLES or name.startswith("return_")]:
            raise RequestError(f"{taken[0]!r} is no variable of a chat template: leave it out")
        settings: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **template_kwargs}
        plain = [plain_message(message) for message in messages]
        if self._takes_control_tokens_as_text():
            settings["sanitize_control_tokens"] = True
        else:
            self._refuse_control_tokens(plain, template_kwargs)
        return list(self._apply_template(plain, tokenize=True, return_dict=False, **settings))

    def render_text(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """A conversation in the target's own chat template, as text; control tokens in messages are refused, because
        they could not be told from the template's."""
        plain = [plain_message(message) for message in messages]
        self._refuse_control_tokens(plain)
        return str(self._apply_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt))

    def _apply_template(self, messages: list[dict[str, Any]], /, **settings: Any) -> Any:
        if not self.has_chat_template:
            raise TargetError("the target's tokenizer has no chat template: pass plain text (--raw)")
        try:
            return self.tokenizer.apply_chat_template(messages, **settings)
        except Exception as error:  # templates raise whatever their author chose; the sentence is the template's own
            raise RequestError(f"the target's chat template refuses this conversation: {error}") from error

    def _takes_control_tokens_as_text(self) -> bool:
        return "sanitize_control_tokens" in inspect.signature(self.tokenizer.apply_chat_template).parameters

    def _refuse_control_tokens(self, *parts: Any) -> None:
        """Raise RequestError where a text holds a special token."""
        for text in texts_in(parts):
            held = next((token for token in self.special_tokens if token in text), None)
            if held is not None:
                raise RequestError(
                    f"a message holds the control token {held!r}: take it out; as text it can only be asked, with a "
                    "transformers that has `sanitize_control_tokens`"
                )

    @cached_property
    def _before(self) -> list[int]:
        """A token that others may stand behind: some decoders leave out the space that the first one begins with."""
        return self.encode_part("a")[-1:]

    def token_text(self, token_id: int, *, is_first: bool = False) -> str:
        """Text of one token behind others, or at the beginning of a text; special tokens written out."""
        before = [] if is_first else self._before
        return self.decode_exactly([*before, token_id])[len(self.decode_exactly(before)) :]

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        """What a token stands for, a part of a character too."""
        key = (token_id, is_first)
        if key not in self._bytes:
            self._bytes[key] = self._bytes_of(token_id, is_first=is_first)
        return self._bytes[key]

    @cached_property
    def _bytes(self) -> dict[tuple[int, bool], bytes]:
        """Of tokens that were asked about: of a prompt with its best tokens there are thousands."""
        return {}

    def _bytes_of(self, token_id: int, *, is_first: bool) -> bytes:
        if token_id in self.byte_tokens:
            return bytes([self.byte_tokens[token_id]])
        text = self.token_text(token_id, is_first=is_first)
        name = self.tokenizer.convert_ids_to_tokens(token_id) if REPLACEMENT in text else None
        if name is not None and all(character in BYTES for character in name):
            return bytes(BYTES[character] for character in name)
        return text.encode()

    @cached_property
    def template_settings(self) -> frozenset[str]:
        """What stands beside a template's own variables in `transformers`, the template itself among them."""
        return NO_VARIABLES | inspect.signature(self.tokenizer.apply_chat_template).parameters.keys()

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template knows what tools are."""
        template = getattr(self.tokenizer, "chat_template", None)
        texts = template.values() if isinstance(template, Mapping) else [template or ""]
        return any(re.search(r"\btools\b", text) for text in texts)

    def response_parser(self, prompt_ids: Sequence[int], tools: Sequence[Mapping[str, Any]]) -> Any:
        """What finds thoughts in an answer and, where there are tools, calls of them (`transformers`' ResponseParser);
        None where this tokenizer does not say how they look."""
        template = getattr(self.tokenizer, "response_template", None)
        if template is None:
            return None
        if not tools:
            fields = {name: field for name, field in template.get("fields", {}).items() if name != "tool_calls"}
            if not fields.keys() & set(THOUGHTS):
                return None
            template = template | {"fields": fields}
        return self.tokenizer.get_response_parser(template, prefix=self.decode_exactly(prompt_ids), tools=list(tools))

    def encode_part(self, text: str) -> list[int]:
        """Token ids of rendered text, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode_exactly(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens written out."""
        return self.decode(token_ids, with_special=True)

    def decode(self, token_ids: Sequence[int], *, with_special: bool = False) -> str:
        """Text of token ids, special tokens left out unless asked for; an id beyond the tokenizer's has none."""
        known = [token for token in token_ids if token in self._known_ids]
        return self._decode(known, skip_special_tokens=not with_special)

    @cached_property
    def _decode(self) -> Callable[..., str]:
        """The tokenizer's decoding, where nothing overrides it without what `transformers` does around it: that took
        most of the time of a token's text."""
        kind, plain = type(self.tokenizer), PreTrainedTokenizerFast
        if issubclass(kind, plain) and (kind.decode, kind._decode) == (plain.decode, plain._decode):
            backend: Callable[..., str] = self.tokenizer.backend_tokenizer.decode
            return backend
        return partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)


class IncrementalText:
    """Turns a growing list of token ids into text pieces; ends at the first stop string.

    `push` returns what may be shown now, `finish` the rest. `stopped` is set by the token that completes a stop
    string, from the one behind `min_tokens` on; the text then excludes the stop string. Stop strings may hold special
    tokens, which are shown only where that is asked for. The work for a token does not grow with the text.
    behind: tokens of a text that this one goes on from, such as a prompt's.
    """

    def __init__(
        self,
        text: Text,
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        shows_special: bool = False,
        behind: Sequence[int] = (),
    ) -> None:
        self._text, self._stops, self._min_tokens = text, tuple(stops), min_tokens
        self._shows_special = shows_special
        self._longest = max(map(len, self._stops), default=0)
        special = text.special_tokens
        self._reads_special = shows_special or any(token in stop for stop in self._stops for token in special)
        self._unread = frozenset() if self._reads_special else frozenset(special.values())
        self._num_tokens = 0
        self._context: list[int] = []  # the last tokens before the open ones: decoders treat a first token differently
        if behind and behind[-1] not in text.byte_tokens and not self._decode(behind[-1:]).endswith(REPLACEMENT):
            self._context = list(behind[-MAX_OPEN:])
        self._open: list[int] = []  # tokens whose text is not certain yet
        self._decoded = ""
        self._num_shown = 0
        self._run, self._rest = "", b""  # of a run of byte tokens: its text, and the bytes of a character to come
        self._broken = False  # it is not UTF-8
        self.stopped = False

    def copy(self) -> IncrementalText:
        """The same, to be carried on independently."""
        other = copy.copy(self)
        other._context, other._open = list(self._context), list(self._open)
        return other

    @property
    def value(self) -> str:
        """All certain text so far, shown or held back, without a completed stop string."""
        return self._visible(self._decoded)

    def push(self, token_id: int) -> str:
        """Add one token; the text that is now certain."""
        self._num_tokens += 1
        if token_id in self._unread:
            return ""  # decoding leaves it out, and joins what stands beside it
        self._open.append(token_id)
        byte = self._text.byte_tokens.get(token_id)
        if byte is None:
            self._push_token()
        else:
            self._push_byte(byte)
        return self._show(self._num_safe())

    def push_all(self, token_ids: Sequence[int]) -> str:
        """Add several: the text is that of one after the other, decoded at once where it ends with a character."""
        if len(token_ids) > 1 and not self._stops and not self._text.byte_tokens:
            read = [token for token in token_ids if token not in self._unread]
            tail = self._tail([*self._open, *read])
            if not tail.endswith(REPLACEMENT):
                self._num_tokens += len(token_ids)
                self._open += read
                self._close(len(self._open), tail)
                return self._show(len(self._decoded))
        return "".join(map(self.push, token_ids))

    def finish(self) -> str:
        """The rest: bytes that never became a character, and a stop prefix that never completed."""
        if not self.stopped and self._open:
            self._close(len(self._open), self._tail(self._open))
        return self._show(len(self._decoded))

    def _push_token(self) -> None:
        """Close the open tokens, unless they end inside a character."""
        self._run, self._broken, self._rest = "", False, b""
        tail = self._tail(self._open)
        if self._text.byte_tokens or not tail.endswith(REPLACEMENT):
            self._close(len(self._open), tail)
            return
        self._look_for_stops(tail)
        if len(self._open) > MAX_OPEN:
            self._close_what_is_certain(tail)

    def _push_byte(self, byte: int) -> None:
        """A run of byte tokens is certain once it has ended, or can no longer become UTF-8."""
        self._rest += bytes([byte])
        try:
            self._run += self._rest.decode("utf-8")
            self._rest = b""
        except UnicodeDecodeError as error:
            self._broken = self._broken or error.reason != "unexpected end of data"
        if self._broken:
            self._close(len(self._open), REPLACEMENT * len(self._open))
        elif not self._rest and any(stop in self._known() + self._run for stop in self._stops):
            self._look_for_stops(self._tail(self._open))

    def _tail(self, open_ids: list[int]) -> str:
        """What open tokens add to the text, were it to end with them."""
        before = self._decode(self._context) if self._context else ""
        return self._decode([*self._context, *open_ids])[len(before) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._text.decode(token_ids, with_special=True) if self._reads_special else self._text.decode(token_ids)

    def _close(self, num_tokens: int, tail: str) -> None:
        """Make the text of the first open tokens certain."""
        self._look_for_stops(tail)
        if self.stopped:
            return
        self._decoded += tail
        closed, self._open = self._open[:num_tokens], self._open[num_tokens:]
        self._context = (closed if tail else [*self._context, *closed])[-MAX_OPEN:]

    def _close_what_is_certain(self, tail: str) -> None:
        """Split open tokens that have become many where a character ends: before one of the last few."""
        for size in range(len(self._open) - CHARACTER_BYTES, len(self._open) - 2 * CHARACTER_BYTES, -1):
            first = self._tail(self._open[:size])
            if first + self._decode(self._open[size:]) == tail:
                self._close(size, first)
                return

    def _known(self) -> str:
        """The end of the certain text, as much of it as may begin a stop string."""
        return self._decoded[max(0, len(self._decoded) - self._longest + 1) :] if self._longest > 1 else ""

    def _look_for_stops(self, tail: str) -> None:
        """End where the text with this tail holds a stop string that was not there before."""
        if self._num_tokens <= self._min_tokens:
            return
        known = self._known()
        found = [at for stop in self._stops if (at := _first_behind(known, tail, stop)) is not None]
        if found:
            self.stopped, self._open = True, []
            self._decoded = self._decoded[: len(self._decoded) - len(known)] + (known + tail)[: min(found)]

    def _num_safe(self) -> int:
        """Characters that no stop string can still swallow."""
        if self.stopped or not self._stops:
            return len(self._decoded)
        for held in range(min(self._longest - 1, len(self._decoded)), 0, -1):
            tail = self._decoded[-held:]
            if any(stop.startswith(tail) for stop in self._stops):
                return len(self._decoded) - held
        return len(self._decoded)

    def _show(self, end: int) -> str:
        piece = self._decoded[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return self._visible(piece)

    def _visible(self, piece: str) -> str:
        for token in self._text.special_tokens if self._reads_special and not self._shows_special else ():
            piece = piece.replace(token, "")
        return piece


def _first_behind(known: str, tail: str, stop: str) -> int | None:
    """Where in both together a stop string stands first that does not end in `known`."""
    at = (known + tail).find(stop, max(0, len(known) - len(stop) + 1))
    return at if at >= 0 else None
