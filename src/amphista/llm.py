"""The user's door: load a target and a drafter once; generate, stream, chat.

import amphista
llm = amphista.load()
answer = llm.generate("Why is the sky blue?")     # answer.text, answer.token_ids, answer.stats
for piece in llm.stream("Why is the sky blue?"):
    print(piece, end="")
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch

from amphista.accept.sampling import plain
from amphista.drafter.base import Drafter
from amphista.drafter.checkpoint import load_proposer, shipped_for
from amphista.drafter.hub import HubAccess
from amphista.drafter.lookup import LOOKUP
from amphista.drafter.proposer import Proposer
from amphista.engine.batch import Batch, Finished, Job
from amphista.engine.costs import costs_for
from amphista.engine.model_defaults import model_settings, tell_unused
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.prefixes import taken_over
from amphista.engine.step import Engine
from amphista.engine.stream import Answer, Stream, answer_of, finish
from amphista.errors import DrafterError, RequestError, TargetError
from amphista.native.build import leave_team
from amphista.prompts import PROMPT_FORMS, are_all, are_prompts, only_text, shown
from amphista.target import DEFAULT_TARGET
from amphista.target.loading import load_target
from amphista.target.target import Target
from amphista.target.text import Message
from amphista.tree.grow import AUTO, DEFAULT_TREE, Measured, check_tree, parse_tree

Prompt = str | Sequence[Message] | Sequence[int]
Params = SamplingParams | Literal["model"] | None
PREFERRED_DRAFTER = "amphista"
BATCH_SIZE = 16
logger = logging.getLogger("amphista")


class LLM:
    """A target and a drafter. Nothing of a generation is kept here: any number may run side by side."""

    def __init__(
        self, target: Target, drafter: Proposer | Drafter | None = None, *, tree: str | int | None = None
    ) -> None:
        self.target, self.drafter = target, Proposer.of(drafter)
        if self.drafter.heads is not None:
            self.drafter.heads.freeze(native=target.is_native)
        costs = costs_for(target, self.drafter) if str(tree or DEFAULT_TREE) == AUTO else None
        measured = Measured(accuracy=calibrated_accuracy(self.drafter), costs=costs)
        self.engine = Engine(target, self.drafter, parse_tree(tree, measured))

    def __repr__(self) -> str:
        target = self.target
        return f"<LLM {target.name}: {target.type_name}, {target.path} path, drafter {self.drafter.name}>"

    @property
    def baseline(self) -> LLM:
        """The same target decoding autoregressively: the same engine, a tree of the root alone."""
        return LLM(self.target)

    @cached_property
    def worker(self) -> ThreadPoolExecutor:
        """The one thread that takes the steps of `async for`: recorded forwards belong to a thread."""
        leave_team()
        return ThreadPoolExecutor(1, thread_name_prefix="amphista")

    def prompt_ids(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a prompt: plain text becomes one user message in the target's chat template.

        raw, or a target without a chat template: the text as it is. Lists hold messages, or token ids, which are taken
        as they are. chat_template_kwargs: the template's own variables, such as enable_thinking.
        """
        prompt = _bare(prompt)
        if are_all(prompt, int) and not any(isinstance(token, bool) for token in prompt):
            if system is not None or chat_template_kwargs:
                raise RequestError("token ids are taken as they are: leave out system and chat_template_kwargs")
            return list(prompt)  # type: ignore[arg-type]
        text = self.target.text
        if text is None:
            raise RequestError("this target was loaded without a tokenizer: pass token ids instead")
        if isinstance(prompt, str):
            if not prompt.strip():
                raise RequestError("the prompt is empty: give some text")
            prompt = [{"role": "user", "content": prompt}]
        elif not isinstance(prompt, list | tuple) or not are_all(prompt, Mapping):
            raise RequestError(f"the prompt is {shown(prompt)}: {PROMPT_FORMS}")
        if raw or not text.has_chat_template:
            if system is not None or chat_template_kwargs:
                raise RequestError("a system message or template variable needs the chat template: leave out --raw")
            return text.encode(only_text(prompt))
        template = {} if chat_template_kwargs is None else chat_template_kwargs
        if not isinstance(template, Mapping) or not all(isinstance(name, str) for name in template):
            raise RequestError(f"chat_template_kwargs is {template!r}: expected a dictionary of names and values")
        messages = [*([{"role": "system", "content": system}] if system is not None else []), *prompt]
        return text.render(messages, **template)

    def params(self, params: Params = None, **settings: Any) -> SamplingParams:
        """Settings on top of `params`; 'model' stands for what the model's own generation_config says."""
        known = {*(field.name for field in dataclasses.fields(SamplingParams)), "max_tokens"}
        if unknown := sorted(settings.keys() - known):
            raise RequestError(f"unknown setting {unknown[0]!r}: expected one of {', '.join(sorted(known))}")
        if {"max_tokens", "max_new_tokens"} <= settings.keys():
            raise RequestError("max_tokens and max_new_tokens are the same setting: give one of them")
        if settings.get("logprobs", True) in (False, None):  # takes back what lies below
            settings.setdefault("top_logprobs", 0)
        if params == "model":
            return SamplingParams(**{**model_settings(self.target), **settings})
        if not isinstance(params, SamplingParams | None):
            raise RequestError(
                f"params is {shown(params)}: expected SamplingParams, 'model', or one for each of a list"
            )
        return replace(params or SamplingParams(), **settings)

    def stream(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        params: Params = None,
        **settings: Any,
    ) -> Stream:
        """Decode piece by piece. Settings are those of SamplingParams, or a whole `params`."""
        ids = self.prompt_ids(prompt, system=system, raw=raw, chat_template_kwargs=chat_template_kwargs)
        return self.stream_ids(ids, self.params(params, **settings))

    def stream_ids(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_end: Callable[[Answer], None] | None = None,
        *,
        after: Stream | None = None,
    ) -> Stream:
        """Decode from token ids. after: an ended stream whose caches are taken over, as far as both begin alike."""
        request = self.engine.new_sequence(_bare(prompt_ids), params)
        if after is not None:
            request.adopt(taken_over(after.request.rows, request.token_ids))
            after.request.release()
        return Stream(self.engine, request, lambda: self.worker, on_end)

    @overload
    def generate(self, prompt: str | Sequence[Message] | Sequence[int], **settings: Any) -> Answer: ...

    @overload
    def generate(self, prompt: Sequence[Prompt], *, batch_size: int | None = None, **settings: Any) -> list[Answer]: ...

    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, batch_size: int | None = None, **settings: Any
    ) -> Answer | list[Answer]:
        """Decode a prompt to its end, or several together; settings as for `stream`.

        A list of texts, of conversations or of lists of token ids is several prompts: see `answers`. Their `params` may
        be a list, too, of one for each; one seed for all is one noise for all.
        """
        prompt = _bare(prompt)
        if not are_prompts(prompt):
            if batch_size is not None:
                raise RequestError("batch_size is for a list of prompts: this is one")
            return finish(self.stream(prompt, **settings))  # type: ignore[arg-type]
        found = dict(self.answers(prompt, batch_size=batch_size, **settings))  # type: ignore[arg-type]
        return [found[index] for index in range(len(prompt))]

    def answers(
        self, prompts: Sequence[Prompt], *, batch_size: int | None = None, **settings: Any
    ) -> Iterator[tuple[int, Answer]]:
        """Decode several prompts, `batch_size` at a time (default 16, or as many as memory holds); yields the number of
        each and its answer as it ends.

        All prompts are checked before the first is decoded: the RequestError names the one that cannot be, and a
        CapacityError tells of a batch_size that memory may not hold. What fails later is told by its answer's `error`
        and stops no other.
        """
        if not isinstance(batch_size := plain(batch_size), int | None):
            raise RequestError(f"batch_size is {shown(batch_size)}: expected a whole number, at least 1")
        jobs = self._jobs(_bare(prompts), settings)
        batch: Batch[int] = Batch(self.engine, BATCH_SIZE if batch_size is None else batch_size)
        if batch_size is not None:
            batch.check_memory(jobs)
        return ((finished.job.tag, self.answer_of(finished)) for finished in batch.run(jobs))

    def _jobs(self, prompts: Sequence[Prompt], settings: dict[str, Any]) -> list[Job[int]]:
        rendering = {name: settings.pop(name) for name in ("system", "raw", "chat_template_kwargs") if name in settings}
        given, jobs = settings.pop("params", None), []
        each = given if isinstance(given, list | tuple) else [self.params(given, **settings)] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(
                f"params holds {len(each)} for {len(prompts)} prompts: give one for each, or one for all"
            )
        for index, prompt in enumerate(prompts):
            try:
                params = self.params(each[index], **settings)
                ids = self.prompt_ids(prompt, **rendering)
                self.engine.check(ids, params)
            except RequestError as error:
                raise RequestError(f"prompts[{index}]: {error}") from error
            jobs.append(Job(ids, params, index))
        return jobs

    def answer_of(self, finished: Finished[Any]) -> Answer:
        """What has become of a job of a batch; a failure is logged, too."""
        request, error = finished.sequence, finished.error
        if error is not None:
            logger.warning(f"prompt {finished.job.tag} could not be answered to its end: {error}")
        reader = self.engine.new_text(request.params)
        text = ""
        if reader is not None:
            reader.push_all([token for token in request.output_ids if token not in request.end_ids])
            reader.finish()
            text = reader.value
        return answer_of(request, text, request.finish_reason or FinishReason.ERROR, error)

    def chat(self, messages: Sequence[Message], **settings: Any) -> Answer:
        """Answer a conversation given as messages; for many turns, `conversation` keeps the caches."""
        return finish(self.stream(messages, **settings))

    def conversation(
        self, system: str | None = None, *, raw: bool = False, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> Conversation:
        """A multi-turn conversation on kept caches."""
        return Conversation(self, system, raw=raw, chat_template_kwargs=chat_template_kwargs)


class Conversation:
    """Messages so far and the caches they left; a next turn reads only what is new.

    The tokens are those of a fresh prompt of the whole conversation, also where the chat template rewrites history, as
    far as the target's forward gives a row the same bits beside few others as beside many: in float32 near enough that
    only a tie could differ, in bfloat16 not always. Against plain decoding on kept caches of its own they are equal.
    """

    def __init__(
        self,
        llm: LLM,
        system: str | None = None,
        *,
        raw: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.llm = llm
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._raw, self._template_kwargs = raw, chat_template_kwargs
        self._stream: Stream | None = None

    def stream(self, turn: str | Sequence[Message], *, params: Params = None, **settings: Any) -> Stream:
        """Start the next turn: a user's text, or messages. Both it and the answer are history once the stream has ended
        or is closed, which a further turn does; a turn closed before its first token leaves nothing behind."""
        params, held = self.llm.params(params, **settings), self.messages
        messages, ids = self._with_turn(turn), self.prompt_ids(turn)
        self.llm.engine.check(ids, params)  # a turn that is refused ends no other
        if self._stream is not None:
            self._stream.close()
        if self.messages is not held:  # that turn is history now
            messages, ids = self._with_turn(turn), self.prompt_ids(turn)
        self._stream = self.llm.stream_ids(
            ids,
            params,
            lambda answer: self._close_turn(messages, answer),
            after=self._stream,
        )
        return self._stream

    def prompt_ids(self, turn: str | Sequence[Message]) -> list[int]:
        """Token ids of everything said, up to and with this turn."""
        return self.llm.prompt_ids(self._with_turn(turn), raw=self._raw, chat_template_kwargs=self._template_kwargs)

    def _with_turn(self, turn: str | Sequence[Message]) -> list[Message]:
        if isinstance(turn, str):
            if not turn.strip():
                raise RequestError("the message is empty: give some text")
            turn = [{"role": "user", "content": turn}]
        elif not are_all(turn, Mapping):
            raise RequestError(f"the turn is {shown(turn)}: expected a text, or a list of messages")
        return [*self.messages, *turn]

    def add(self, turn: str | Sequence[Message], answer: Answer) -> None:
        """Take a turn into the history with an answer that was decoded elsewhere (in a batch)."""
        self._close_turn(self._with_turn(turn), answer)

    def _close_turn(self, messages: list[Message], answer: Answer) -> None:
        if answer.token_ids:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]

    def send(self, turn: str | Sequence[Message], *, params: Params = None, **settings: Any) -> Answer:
        """One whole turn."""
        return finish(self.stream(turn, params=params, **settings))


def _bare(prompt: Any) -> Any:
    """The list of token ids in what a tokenizer returns, an array, a tensor or a range; else the prompt as it is."""
    prompt = prompt.get("input_ids", prompt) if isinstance(prompt, Mapping) else prompt
    return list(prompt) if isinstance(prompt, range) else plain(prompt)


def load(
    target: str | Path = DEFAULT_TARGET,
    drafter: str | Path | None = None,
    *,
    tree: str | int | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    fast: bool = True,
    native: bool = True,
    tensor_parallel: bool = False,
    allow_other_target: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> LLM:
    """Load a target (named default, folder, GGUF file or hub id) and a drafter.

    drafter: 'none', a name shipped for this target ('amphista', 'medusa'), a folder or a hub id; 'lookup', which drafts
    what followed the same tokens before; or any of them with '+lookup'. By default 'amphista+lookup' where an Amphista
    drafter is shipped for the target, else 'lookup', which is logged. tree: see `parse_tree`; 'auto' measures this
    machine once. fast: the fast forward where the target qualifies (`llm.target.path`), on CUDA as captured graphs,
    else the stock model. native: on a CPU in C, where a compiler is at hand, else in torch. tensor_parallel: over all
    processes that torchrun has started, of which only the first returns from here (target/sharded.py). revision (of a
    target), token, cache_dir, local_files_only: for the hub; a drafter's revision is written behind its id:
    owner/name@revision.

    Sampling settings in the model's generation_config are not applied unless asked for by params='model'; what it has
    of them is logged as a warning.
    """
    check_tree(tree)
    for given, error in ((target, TargetError), (LOOKUP if drafter is None else drafter, DrafterError)):
        if not isinstance(given, str | Path) or given == "":
            raise error(f"{shown(given)} is no name, folder or hub id; what is loaded already goes to LLM and Target")
    hub = HubAccess(token=token, cache_dir=None if cache_dir is None else str(cache_dir), local_only=local_files_only)
    source: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": hub.cache_dir,
        "local_files_only": local_files_only,
    }
    kind = None if dtype is None else str(dtype).removeprefix("torch.")
    source = {name: value for name, value in source.items() if value}
    if tensor_parallel:
        from amphista.target.sharded import load_sharded

        loaded: Target = load_sharded(str(target), dtype=kind, **source)
    else:
        loaded = load_target(str(target), device=device, dtype=kind, fast=fast, native=native, **source)
    tell_unused(loaded)
    name = None if drafter is None else str(drafter)
    return LLM(loaded, choose_drafter(loaded, name, allow_other_target=allow_other_target, hub=hub), tree=tree)


def calibrated_accuracy(proposer: Proposer) -> list[list[float]] | None:
    """What a static tree is built from, where the drafter has it."""
    calibration = None if proposer.heads is None else proposer.heads.calibration
    return None if calibration is None else calibration.accuracy


def choose_drafter(
    target: Target, name: str | None, *, allow_other_target: bool = False, hub: HubAccess | None = None
) -> Proposer:
    """The named drafter; by default lookup, beside the preferred drafter where one is shipped."""
    if name is None:
        shipped = shipped_for(PREFERRED_DRAFTER, target.fingerprint)
        if shipped is not None and shipped.fingerprint != target.fingerprint and not allow_other_target:
            shipped = None
        if shipped is None:
            logger.info(f"no drafter is shipped for {target.name}: drafting by lookup alone (see `amphista train`)")
        name = LOOKUP if shipped is None else f"{PREFERRED_DRAFTER}+{LOOKUP}"
    return load_proposer(
        name, target.spec, target.shared, target.fingerprint, allow_other_target=allow_other_target, hub=hub
    )
