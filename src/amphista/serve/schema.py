"""What may be asked of the server, as OpenAI spells it; pydantic checks it before anything else sees it.

Fields not named here are taken and mean nothing. Those of type `Refused`, and those in `foreign`, would change the
answer if they were ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from amphista.engine.params import SamplingParams
from amphista.serve.foreign import refuse_foreign

MAX_CHOICES = 32  # of one request, prompts times n
MAX_PARTS = 2048  # of a conversation, or of one message: to check many small ones would hold up everybody
MAX_ENTRIES = 4096  # of an object
MAX_IDS = 2**20


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise ValueError(f"{len(value)} entries: at most {MAX_ENTRIES}")
    return value


def _text_alone(kind: Any) -> Any:
    if isinstance(kind, str) and not kind.endswith("text"):
        raise ValueError("images are not supported, nor anything else but text: leave this part out")
    return kind


def listed(most: int, least: int = 0) -> Any:
    """How long a list may be; its first wrong element is told, not each: there may be a million."""
    return Field(min_length=least, max_length=most, fail_fast=True)


Few = BeforeValidator(_few)
OnlyText = BeforeValidator(_text_alone)
Refused = Annotated[None, Field(description="Not supported: must be left out.")]
Whole = Annotated[int, BeforeValidator(_whole)]  # 5.0 is one in JSON
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], listed(MAX_IDS)]
BiasedId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]  # its length is paid for with every token


class Body(BaseModel):
    """JSON as it stands: no text becomes a number."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(Body):
    type: Annotated[Literal["text"], OnlyText]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], listed(MAX_PARTS)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], listed(MAX_PARTS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing: expected a text, or a list of text parts")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: arguments of calls as objects, developers as the system."""
        plain = self.model_dump(exclude_none=True)
        plain["role"] = "system" if self.role == "developer" else self.role
        plain.setdefault("content", "")
        for call in plain.get("tool_calls", []):
            call["function"]["arguments"] = _object(call["function"]["arguments"])
        return plain


Messages = Annotated[list[Message], listed(MAX_PARTS, 1)]


def _object(text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, dict) else text


class Function(Body):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class AnyText(Body):
    type: Literal["text"]


class JsonObject(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchema(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class GrammarText(Body):
    """As in OpenAI's custom tools; Lark as llguidance has it."""

    type: Literal["grammar"]
    syntax: Literal["lark", "regex"]
    definition: str


ResponseFormat = Annotated[AnyText | JsonObject | JsonSchema | GrammarText, Field(discriminator="type")]


class StreamOptions(Body):
    include_usage: bool | None = None


class Own(Body):
    """drafter "none": decode this request plainly, among whatever others. trace: tell each step's tree."""

    drafter: Literal["none"] | None = None
    trace: bool = False


class Sampled(Body):
    """What chat and completions share."""

    model: str | None = None
    max_tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[Whole, Field(ge=1, le=8)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], listed(16)] | None = None
    stop_token_ids: Annotated[list[TokenId], listed(64)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[Whole, Field(ge=0, lt=2**31)] | None = None
    logit_bias: Annotated[dict[BiasedId, Annotated[float, Field(ge=-100, le=100)]], Few] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    amphista: Own | None = None

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def num_asked(self) -> int | None:
        """Tokens an answer may have."""
        return self.max_tokens

    @property
    def num_by_default(self) -> int | None:
        """How many where nobody asks, if there is room for them; None: as many as there is room for."""
        return None

    @property
    def num_top_logprobs(self) -> int | None:
        """How many of the best tokens to tell beside each, None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def tells_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's own tokens are wanted."""
        return False

    @property
    def goes_on(self) -> bool:
        """Whether the answer goes on with the prompt's text."""
        return False

    def params(self, seed: int, max_new_tokens: int) -> SamplingParams:
        """Settings of an answer; OpenAI's temperature is 1 where none is given."""
        names = ("top_p", "top_k", "min_p", "min_tokens", "logit_bias", "presence_penalty", "frequency_penalty")
        given = {name: getattr(self, name) for name in (*names, "repetition_penalty", "stop", "stop_token_ids")}
        top = self.num_top_logprobs
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            temperature=1.0 if self.temperature is None else self.temperature,
            ignore_eos=bool(self.ignore_eos),
            logprobs=top is not None,
            top_logprobs=top or 0,
            seed=seed,
            max_new_tokens=max_new_tokens,
        )

    @model_validator(mode="before")
    @classmethod
    def _is_not_foreign(cls, body: Any) -> Any:
        refuse_foreign(body)
        return body

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        has_form = self.response_format is not None and self.response_format.type != "text"
        if has_form and (self.ignore_eos or self.min_tokens):
            raise ValueError("response_format says where an answer ends: leave out ignore_eos and min_tokens")
        return self


class ChatRequest(Sampled):
    messages: Messages
    max_completion_tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], listed(128)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    modalities: Annotated[list[Literal["text"]], listed(8)] | None = None
    audio: Refused = None
    functions: Refused = None
    function_call: Refused = None
    prediction: Refused = None
    web_search_options: Refused = None

    @field_validator("top_logprobs")
    @classmethod
    def _is_told(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("needs logprobs, too: set that to true, or leave this out")
        return value

    @property
    def num_asked(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def goes_on(self) -> bool:
        return bool(self.continue_final_message)

    @property
    def told_tools(self) -> list[dict[str, Any]] | None:
        """Tools that the model shall know of."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


class CompletionRequest(Sampled):
    prompt: (
        str
        | Annotated[list[str], listed(MAX_IDS, 1)]
        | Annotated[list[TokenId], listed(MAX_IDS, 1)]
        | Annotated[list[TokenIds], listed(MAX_IDS, 1)]
    )
    max_tokens: Annotated[Whole, Field(ge=0, lt=2**31)] | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Whole | None = None
    suffix: Refused = None

    @property
    def num_by_default(self) -> int:
        """OpenAI's."""
        return 16

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def tells_prompt(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

    @property
    def goes_on(self) -> bool:
        return True

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)

    @model_validator(mode="after")
    def _is_told_once(self) -> Self:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError(f"best_of is {self.best_of}, expected n ({self.num_choices}): answers are not ranked")
        if len(self.prompts) * self.num_choices > MAX_CHOICES:
            raise ValueError(f"{len(self.prompts)} prompts with n = {self.num_choices}: at most {MAX_CHOICES} answers")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which asks for nothing without echo: expected at least 1")
        return self


class TokenizeRequest(Body):
    """A text, or messages in the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: TokenIds


class TemplateRequest(Body):
    model: str | None = None
    messages: Messages
    add_generation_prompt: bool = True
