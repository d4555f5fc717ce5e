"""The user's door: load a target and a drafter once; generate, stream, chat.

import amphista
llm = amphista.load()
answer = llm.generate("Why is the sky blue?")     # answer.text, answer.token_ids, answer.stats
for piece in llm.stream("Why is the sky blue?"):
    print(piece, end="")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from amphista.drafter.base import Drafter
from amphista.drafter.checkpoint import load_drafter, shipped_for
from amphista.drafter.heads import ParallelHeads
from amphista.drafter.lookup import LOOKUP
from amphista.drafter.none import NoDrafter
from amphista.engine.costs import costs_for
from amphista.engine.decoder import Decoding
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.sequence import Context
from amphista.engine.stats import DecodeStats
from amphista.engine.step import Engine, StepResult
from amphista.errors import RequestError
from amphista.target import DEFAULT_TARGET
from amphista.target.loading import load_target, say
from amphista.target.target import Target
from amphista.target.text import Message
from amphista.tree.grow import AUTO, DEFAULT_TREE, Measured, check_tree, parse_tree

Prompt = str | Sequence[Message]
PREFERRED_DRAFTER = "amphista"


@dataclass(frozen=True)
class Answer:
    """A finished answer. `token_ids` hold the end token or a completed stop string, `text` does not."""

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    finish_reason: FinishReason
    stats: DecodeStats
    params: SamplingParams


class Stream:
    """Iterate for text pieces; once the iteration has ended, `answer` and `stats` are there."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding

    @property
    def stats(self) -> DecodeStats:
        """Counters, growing while the stream runs."""
        return self._decoding.sequence.stats

    def __iter__(self) -> Iterator[str]:
        for result in self.steps():
            if result.text:
                yield result.text

    def steps(self) -> Iterator[StepResult]:
        """The same stream, one record per target forward."""
        return iter(self._decoding)

    @property
    def answer(self) -> Answer:
        """The finished answer; raises RequestError while the stream still runs."""
        sequence = self._decoding.sequence
        if sequence.finish_reason is None:
            raise RequestError("the stream has not ended: read it to its end first")
        return Answer(
            text="" if sequence.text is None else sequence.text.value,
            token_ids=list(sequence.output_ids),
            prompt_ids=sequence.prompt_ids,
            finish_reason=sequence.finish_reason,
            stats=sequence.stats,
            params=sequence.params,
        )


class LLM:
    """A target and a drafter. Nothing of a generation is kept here: any number may run side by side."""

    def __init__(self, target: Target, drafter: Drafter | None = None, *, tree: str | int | None = None) -> None:
        self.target = target
        self.drafter = drafter or NoDrafter()
        if isinstance(self.drafter.inner, ParallelHeads):
            self.drafter.inner.freeze(as_trained=target.is_static)
        costs = costs_for(target, self.drafter) if str(tree or DEFAULT_TREE) == AUTO else None
        measured = Measured(accuracy=calibrated_accuracy(self.drafter), costs=costs)
        self.engine = Engine(target, self.drafter, parse_tree(tree, measured))

    def with_drafter(self, drafter: Drafter, *, tree: str | int | None = None) -> LLM:
        """The same target with another drafter."""
        return LLM(self.target, drafter, tree=tree)

    @property
    def baseline(self) -> LLM:
        """The same target decoding autoregressively: the same engine, a tree of the root alone."""
        return LLM(self.target)

    def prompt_ids(self, prompt: Prompt, *, system: str | None = None, raw: bool = False) -> list[int]:
        """Token ids of a prompt: plain text becomes one user message in the target's chat template.

        raw, or a target without a chat template: the text as it is. Lists are messages with role and content.
        """
        if self.target.text is None:
            raise RequestError("this target was loaded without a tokenizer: pass token ids to the engine instead")
        if isinstance(prompt, str):
            if not prompt.strip():
                raise RequestError("the prompt is empty: give some text")
            if raw or not self.target.text.has_chat_template:
                if system is not None:
                    raise RequestError("a system message needs the chat template: leave out --raw or --system")
                return self.target.text.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        if not prompt:
            raise RequestError("the conversation is empty: give at least one message")
        messages = [*([{"role": "system", "content": system}] if system is not None else []), *prompt]
        return self.target.text.render(messages)

    def stream(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        params: SamplingParams | None = None,
        **settings: Any,
    ) -> Stream:
        """Decode piece by piece. Settings are those of SamplingParams, or a whole `params`."""
        return self.stream_ids(self.prompt_ids(prompt, system=system, raw=raw), _params(params, settings))

    def stream_ids(self, prompt_ids: list[int], params: SamplingParams, context: Context | None = None) -> Stream:
        """Decode from token ids, on a kept context where one is given."""
        return Stream(Decoding(self.engine, prompt_ids, params, context))

    def generate(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        params: SamplingParams | None = None,
        **settings: Any,
    ) -> Answer:
        """Decode a prompt (or a list of messages) to its end."""
        return finish(self.stream(prompt, system=system, raw=raw, params=params, **settings))

    def chat(self, messages: Sequence[Message], *, params: SamplingParams | None = None, **settings: Any) -> Answer:
        """Answer a conversation given as messages; for many turns, `conversation` keeps the caches."""
        return self.generate(list(messages), params=params, **settings)

    def conversation(self, system: str | None = None) -> Conversation:
        """A multi-turn conversation on kept caches."""
        return Conversation(self, system)


class Conversation:
    """Messages so far and the caches they left; a next turn reads only what is new.

    Equal to a fresh prefill of the whole conversation, also where the chat template rewrites history.
    """

    def __init__(self, llm: LLM, system: str | None = None) -> None:
        self.llm = llm
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._context = llm.engine.new_context()

    def stream(self, text: str, *, params: SamplingParams | None = None, **settings: Any) -> Stream:
        """Start the next turn; call `close_turn` with its text once it has ended (or was broken off)."""
        if not text.strip():
            raise RequestError("the message is empty: give some text")
        prompt_ids = self.llm.prompt_ids([*self.messages, {"role": "user", "content": text}])
        stream = self.llm.stream_ids(prompt_ids, _params(params, settings), self._context)
        self.messages.append({"role": "user", "content": text})
        return stream

    def close_turn(self, answer_text: str) -> None:
        """Put an answer into the history."""
        self.messages.append({"role": "assistant", "content": answer_text})

    def send(self, text: str, *, params: SamplingParams | None = None, **settings: Any) -> Answer:
        """One whole turn."""
        answer = finish(self.stream(text, params=params, **settings))
        self.close_turn(answer.text)
        return answer


def finish(stream: Stream) -> Answer:
    """Read a stream to its end."""
    for _ in stream.steps():
        pass
    return stream.answer


def _params(params: SamplingParams | None, settings: dict[str, Any]) -> SamplingParams:
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise RequestError(f"unknown setting {unknown[0]!r}: expected one of {', '.join(sorted(known))}")
    if "stop" in settings and isinstance(settings["stop"], list):
        settings = {**settings, "stop": tuple(settings["stop"])}
    if params is None:
        return SamplingParams(**settings)
    return dataclasses.replace(params, **settings)


def load(
    target: str = DEFAULT_TARGET,
    drafter: str | None = None,
    *,
    tree: str | int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    fast: bool = True,
    allow_other_target: bool = False,
) -> LLM:
    """Load a target (named default, folder, GGUF file or hub id) and a drafter.

    drafter: 'none', a name shipped for this target ('amphista', 'medusa'), a folder or a hub id; 'lookup', which drafts
    what followed the same tokens before; or any of them with '+lookup'. By default 'amphista+lookup' where an Amphista
    drafter is shipped for the target, else 'lookup', said on standard error. tree: see `parse_tree`; 'auto' measures
    this machine once. fast: the fast forward where the target qualifies (`llm.target.path`), on CUDA as captured
    graphs, else the stock model.
    """
    check_tree(tree)
    loaded = load_target(target, device=device, dtype=dtype, fast=fast)
    return LLM(loaded, choose_drafter(loaded, drafter, allow_other_target=allow_other_target), tree=tree)


def calibrated_accuracy(drafter: Drafter) -> list[list[float]] | None:
    """What a static tree is built from, where the drafter has it."""
    calibration = drafter.inner.calibration if isinstance(drafter.inner, ParallelHeads) else None
    return None if calibration is None else calibration.accuracy


def choose_drafter(target: Target, name: str | None, *, allow_other_target: bool = False) -> Drafter:
    """The named drafter; by default lookup, beside the preferred drafter where one is shipped."""
    if name is None:
        shipped = shipped_for(PREFERRED_DRAFTER, target.fingerprint)
        if shipped is not None and shipped.fingerprint != target.fingerprint and not allow_other_target:
            shipped = None
        if shipped is None:
            say(f"no drafter is shipped for {target.name}: drafting by lookup alone (see `amphista train`)")
        name = LOOKUP if shipped is None else f"{PREFERRED_DRAFTER}+{LOOKUP}"
    return load_drafter(name, target.spec, target.shared, target.fingerprint, allow_other_target=allow_other_target)
