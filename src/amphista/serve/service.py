"""Service: requests as they were checked become sequences, and sequences calls that can be waited for or cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from amphista.accept.sampling import fresh_seed
from amphista.engine.loop import CLOSED, Update
from amphista.engine.params import SamplingParams
from amphista.engine.request import Request
from amphista.engine.scheduler import Limits
from amphista.engine.sequence import Sequence as Decoded
from amphista.errors import ConfigError, RequestError, UnavailableError
from amphista.llm import LLM
from amphista.prompts import texts_in
from amphista.serve.answers import Piece, Reader
from amphista.serve.errors import ApiError
from amphista.serve.grammar import Grammars
from amphista.serve.metrics import Metrics
from amphista.serve.schema import ChatRequest, CompletionRequest, Message, Sampled
from amphista.serve.worker import Ticket, Worker
from amphista.target.text import IncrementalText
from amphista.tree.grow import ALONE, AutoGrower
from amphista.tree.learned import Forward, StepCosts

GRAMMAR_SECONDS = 2.0
PING_SECONDS = 15.0
Result = TypeVar("Result")


@dataclass
class Call:
    """One request on its way: a reader for each choice, in order."""

    id: str
    model: str
    seed: int
    body: Sampled
    ticket: Ticket
    readers: dict[Request, Reader]
    traced: Callable[[], dict[str, Any]]  # what is told beside traced steps
    prompts: list[str] = field(default_factory=list)  # where they are to be echoed
    created: int = field(default_factory=lambda: int(time.time()))
    _first: list[Update] | None = None

    @property
    def sequences(self) -> list[Decoded]:
        """Of all choices."""
        return [reader.sequence for reader in self.readers.values()]

    async def begin(self) -> bool:
        """Wait for a first sign, so that a refusal gets a status; not for ever. raises what it was refused for."""
        self._first = await self.ticket.next(PING_SECONDS)
        for update in self._first:
            if update.error is not None:
                raise update.error
        return True

    async def rest(self) -> list[tuple[int, Piece]]:
        """All pieces, by choice, once all have ended."""
        self.ticket.is_patient, found = True, list[tuple[int, Piece]]()
        while (pieces := await self.pieces()) is not None:
            found += pieces
        return found

    async def pieces(self) -> list[tuple[int, Piece]] | None:
        """What is new, by choice; an empty list when it is time to ping, None behind the end."""
        found: list[tuple[int, Piece]] = []
        while not found:
            if self._first is None and all(reader.has_ended for reader in self.readers.values()):
                return None
            updates, self._first = self._first or await self.ticket.next(PING_SECONDS), None
            if not updates:
                return []
            for index, (request, reader) in enumerate(self.readers.items()):
                mine = [update for update in updates if update.request is request]
                if mine and not (piece := reader.read(mine)).is_empty:
                    found.append((index, Piece(finish_reason="length") if self.body.num_asked == 0 else piece))
        return found


class Service:
    """An LLM that many may ask at once. Texts are rendered in one thread, grammars compiled in another."""

    def __init__(self, llm: LLM, limits: Limits, name: str, *, ignore_tools: bool = False) -> None:
        """ignore_tools: answer without tools where the chat template knows none, which is refused else."""
        if llm.target.text is None:
            raise ConfigError("the server needs a tokenizer, and this target was loaded without one")
        self.llm, self.text, self.name, self._ignore_tools = llm, llm.target.text, name, ignore_tools
        self.worker = Worker(llm.engine, limits)
        self._costs = costs = _step_costs(llm)
        self.metrics = Metrics(name, lambda: self.worker.load, None if costs is None else lambda: _cost_ratio(costs))
        self.is_ready, self._is_closed = False, False
        self._most_characters = self.max_len * max(map(len, self.text.vocabulary))
        self._grammars = Grammars(llm.target)
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="amphista-text")
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="amphista-grammar")

    @property
    def max_len(self) -> int:
        """Tokens of the longest prompt and answer together."""
        return min(self.llm.target.spec.max_positions, self.worker.limits.max_request_len)

    async def start(self) -> None:
        """Begin to decode; ready once a first short answer has shown that it works."""
        self.worker.start()
        params = SamplingParams(max_new_tokens=4, ignore_eos=True)
        ticket = self.worker.submit([self.llm.engine.new_sequence([0, 0], params)], "", None)
        last = None
        while last is None or not last.state.has_ended:
            last = [last, *await ticket.next(PING_SECONDS)][-1]
        if last.error is not None:
            raise last.error
        with contextlib.suppress(RequestError):  # of a tokenizer that knows no forms: whoever asks for one hears it
            await self._compiled({"type": "json_object"})
        self.worker.on_updates = self.metrics.note
        self.is_ready = True

    async def close(self, drain_seconds: float) -> None:
        """End, answers first."""
        self.is_ready = False
        await self.worker.close(drain_seconds)
        self._is_closed = True
        self._renderer.shutdown(wait=False, cancel_futures=True)
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def check_model(self, name: str | None) -> None:
        """raises ApiError for a model that is not here."""
        if name not in (None, self.name):
            message = f"the model {name!r} does not exist here: this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def chat(self, body: ChatRequest, tenant: int) -> Call:
        """Start answers to a conversation."""
        self.check_model(body.model)
        tools = body.told_tools
        if tools and not self.text.takes_tools:
            if not self._ignore_tools:
                message = "this model's chat template knows no tools: leave them out, or start with --ignore-tools"
                raise ApiError(400, message, param="tools")
            tools = None
        prompt = await self.rendered(lambda: self._prompt(body, tools))
        return await self._call(
            "chatcmpl", body, [prompt], tenant, lambda: self.text.response_parser(prompt, tools or [])
        )

    async def complete(self, body: CompletionRequest, tenant: int) -> Call:
        """Start answers to prompts as they are."""
        self.check_model(body.model)
        prompts = await self.rendered(lambda: [self._ids(prompt) for prompt in body.prompts])
        call = await self._call("cmpl", body, prompts, tenant)
        if body.echo:
            call.prompts = [p if isinstance(p, str) else self.text.decode(p) for p in body.prompts]
        return call

    def traced(self) -> dict[str, Any]:
        """What a trace tells beside its steps: requests that run now, and the tokens of theirs that a plain step would
        give in the time of one more node: None where no costs are known."""
        num_running = max(1, self.worker.load.num_running)
        price = None
        if self._costs is not None:
            seconds = self._costs.by_rows(Forward(num_running, num_running))
            price = round(num_running * (seconds(num_running + 1) / seconds(num_running) - 1), 3)
        return {"running": num_running, "node_price": price}

    def check_length(self, texts: Iterable[str]) -> None:
        """raises ApiError for texts that can be no prompt, were every token the longest: counting the tokens of
        megabytes takes seconds, and who comes next would wait for it."""
        if sum(map(len, texts)) > self._most_characters:
            message = f"a prompt of more than {self._most_characters} characters is longer than the context"
            raise ApiError(400, message, code="context_length_exceeded")

    async def rendered(self, work: Callable[[], Result]) -> Result:
        """The result of some work on texts, which does not hold up asyncio."""
        return await self._in(self._renderer, work)

    def render(self, messages: Sequence[Message], /, **settings: Any) -> list[int]:
        """Token ids of a conversation."""
        return self.text.render([message.for_template() for message in messages], **settings)

    def _prompt(self, body: ChatRequest, tools: list[dict[str, Any]] | None) -> list[int]:
        self.check_length(texts_in(body.model_dump(include={"messages", "tools"})))
        settings: dict[str, Any] = dict(body.chat_template_kwargs or {})
        if taken := sorted(settings.keys() & self.text.template_settings):  # a template is a program: nobody sends one
            raise ApiError(400, f"{taken[0]!r} is no variable of a chat template", param="chat_template_kwargs")
        if tools:
            settings["tools"] = tools
        if body.reasoning_effort is not None:
            settings["reasoning_effort"] = body.reasoning_effort
        if body.continue_final_message:
            settings |= {"continue_final_message": True, "add_generation_prompt": False}
        return self.render(body.messages, **settings)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self.check_length([prompt])
        ids = self.text.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError(400, "the prompt is empty: give some text", param="prompt")
        return ids

    async def _call(
        self,
        kind: str,
        body: Sampled,
        prompts: list[list[int]],
        tenant: int,
        parse: Callable[[], Any] = lambda: None,
    ) -> Call:
        grammar = await self._grammar(body)
        seed = fresh_seed() if body.seed is None else body.seed % 2**64
        readers = []
        for prompt in prompts:
            max_new_tokens = max(1, self._num_new_tokens(len(prompt), body.num_asked, body.num_by_default))
            for index in range(body.num_choices):
                params = body.params((seed + index) % 2**64, max_new_tokens)
                sequence, parser = self.llm.engine.new_sequence(prompt, params), parse()
                text = IncrementalText(
                    self.text,
                    params.stop,
                    params.min_tokens,
                    shows_special=parser is not None,
                    behind=prompt if body.goes_on else (),
                )
                sequence.stops = text.copy() if params.stop else None  # the engine's; both must end at the same token
                sequence.chooser.grammar = None if grammar is None else grammar()
                sequence.drafts = body.amphista is None or body.amphista.drafter is None
                sequence.is_traced = body.amphista is not None and body.amphista.trace
                sequence.prompt_logprobs = [] if body.tells_prompt else None
                readers.append(Reader(self.text, sequence, text, parser))
        namespace = None if body.tells_prompt else (tenant, body.cache_salt, body.prompt_cache_key)
        ticket = self.worker.submit([reader.sequence for reader in readers], tenant, namespace)
        name = f"{kind}-{secrets.token_hex(12)}"
        readers_of = dict(zip(ticket.requests, readers, strict=True))
        return Call(name, self.name, seed if body.seed is None else body.seed, body, ticket, readers_of, self.traced)

    def _num_new_tokens(self, num_prompt: int, asked: int | None, default: int | None) -> int:
        """What is asked for, or what there is room for. raises ApiError."""
        room = self.max_len - num_prompt
        if room < 1 or (asked or 0) > room:
            text = f"the prompt has {num_prompt} tokens" + ("" if asked is None else f", its answer may have {asked}")
            message = f"{text}: together they must not be more than {self.max_len - (asked is None)}"
            raise ApiError(400, message, param="max_tokens", code="context_length_exceeded")
        return min(room if default is None else default, room) if asked is None else asked

    async def _grammar(self, body: Sampled) -> Any:
        """What makes the answers' matchers, where they must have a form."""
        if body.response_format is None:
            return None
        try:
            work = self._compiled(body.response_format.model_dump(by_alias=True))
            return await asyncio.wait_for(work, GRAMMAR_SECONDS)
        except RequestError as error:
            raise ApiError(400, str(error), param="response_format") from error
        except TimeoutError:
            message = f"response_format takes more than {GRAMMAR_SECONDS:.0f} s to compile: make it simpler"
            raise ApiError(400, message, param="response_format") from None

    async def _compiled(self, response_format: dict[str, Any]) -> Any:
        return await self._in(self._compiler, lambda: self._grammars.compiled(response_format))

    async def _in(self, executor: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        if self._is_closed:
            raise UnavailableError(CLOSED)
        return await asyncio.get_running_loop().run_in_executor(executor, work)


def _step_costs(llm: LLM) -> StepCosts | None:
    """What steps are known to cost, where trees are grown by that."""
    grower = llm.engine.grower
    return grower.budget.costs if isinstance(grower, AutoGrower) else None


def _cost_ratio(costs: StepCosts) -> float:
    return costs.seconds(ALONE) / costs.costs.forward(1)
