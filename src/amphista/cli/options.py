"""Options that several commands share, declared once: alone, or as records that a command takes whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from amphista.errors import RequestError
from amphista.target import DEFAULT_TARGET

if TYPE_CHECKING:
    from amphista.engine.params import SamplingParams
    from amphista.llm import LLM

MODEL, TREE, SAMPLING = "Model", "Tree", "Sampling"

Target = Annotated[
    str,
    typer.Option(
        help="Named default, folder, .gguf file or hub id of a decoder-only causal LM.", rich_help_panel=MODEL
    ),
]
Drafter = Annotated[
    str | None,
    typer.Option(
        help="none, a name shipped for this target (amphista, medusa), a folder or a hub id; lookup, which drafts what "
        "followed the same tokens before; or NAME+lookup. Default: amphista+lookup where one is shipped, else lookup.",
        rich_help_panel=MODEL,
    ),
]
AllowOtherTarget = Annotated[
    bool,
    typer.Option(
        "--allow-other-target",
        help="Use a drafter trained for other weights of the same shape: still exact, may accept less.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N. Default: cuda if there is one.", rich_help_panel=MODEL)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16, int8 (products of 8 bits, of a .gguf file's own blocks where there are such, "
        "on CPU: another target, exact against itself), gguf (such blocks: the float32 target in less memory). Default "
        "on CPU: gguf for such files where the C step takes them, else float32; elsewhere the model's.",
        rich_help_panel=MODEL,
    ),
]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast/--no-fast",
        help="The fast forward where the target qualifies (`amphista info --check` tells), or the stock model.",
        rich_help_panel=MODEL,
    ),
]
Native = Annotated[
    bool,
    typer.Option(
        "--native/--no-native",
        help="The fast forward in C where a compiler is at hand, or in torch, for comparison.",
        rich_help_panel=MODEL,
    ),
]
Tree = Annotated[
    str | None,
    typer.Option(
        metavar="auto|chain|N|static:N|FILE",
        help="auto: as large as pays here, in each step (measured once, `amphista dev tune` shows it); chain; N nodes "
        "chosen anew in each step (root included, 1 is plain decoding); static:N from the drafter's calibration; or "
        "a template file. Default auto.",
        rich_help_panel=TREE,
    ),
]
System = Annotated[str | None, typer.Option(help="System message.", rich_help_panel=SAMPLING)]
TemplateArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--template-arg",
        metavar="NAME=VALUE",
        help="A variable of the chat template, as JSON, e.g. enable_thinking=false (repeatable).",
        rich_help_panel=SAMPLING,
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What is loaded, and from where."""

    target: Target = DEFAULT_TARGET
    drafter: Drafter = None
    allow_other_target: AllowOtherTarget = False
    device: Device = None
    dtype: Dtype = None
    fast: Fast = True
    native: Native = True
    tensor_parallel: Annotated[
        bool,
        typer.Option(
            "--tensor-parallel",
            help="Spread the target over the processes that torchrun has started; the stock model.",
            rich_help_panel=MODEL,
        ),
    ] = False
    tree: Tree = None
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a target on the hub.", rich_help_panel=MODEL)
    ] = None
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder for what the hub sends. Default: the hub's own.", rich_help_panel=MODEL)
    ] = None
    local_files_only: Annotated[
        bool, typer.Option("--local-files-only", help="Only what was fetched before.", rich_help_panel=MODEL)
    ] = False

    def load(self, params: SamplingParams | None = None) -> LLM:
        """Target and drafter, ready to decode; the hub's token comes from its login or HF_TOKEN.

        params: refused, where the target lacks tokens that they name, before the machine is measured.
        """
        from amphista.llm import LLM, load
        from amphista.tree.grow import check_tree

        check_tree(self.tree)
        llm = load(**asdict(self) | {"tree": 1})
        if params is not None:
            params.check_ids(llm.target.spec.vocab_size)
        return LLM(llm.target, llm.drafter, tree=self.tree)


def _setting(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=SAMPLING, show_default=False, **more)


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """How tokens are chosen, and how many; what is None was not asked for."""

    max_new_tokens: Annotated[
        int | None, _setting("At most this many tokens an answer. Default 256.", "--max-new-tokens", "--max-tokens")
    ] = None
    temperature: Annotated[float | None, _setting("0, the default, is greedy.")] = None
    top_k: Annotated[int | None, _setting("Keep the k best tokens.")] = None
    top_p: Annotated[float | None, _setting("Keep the best tokens holding this probability.")] = None
    min_p: Annotated[float | None, _setting("Drop tokens below this share of the best one's probability.")] = None
    repetition_penalty: Annotated[
        float | None, _setting("Above 1 makes tokens already in prompt or answer less likely.")
    ] = None
    seed: Annotated[
        int | None,
        _setting("Same seed, same text, whatever drafter or tree. Default: a fresh one, told (evaluate: 0)."),
    ] = None
    ignore_eos: Annotated[
        bool | None, _setting("Decode on behind end tokens, for measuring long answers.", "--ignore-eos")
    ] = None

    def settings(self) -> dict[str, Any]:
        """Those of SamplingParams that were asked for."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def params(self) -> SamplingParams:
        """Checked settings, the others at their defaults."""
        from amphista.engine.params import SamplingParams

        return SamplingParams(**self.settings())


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(ChoiceOptions):
    """All sampling settings."""

    frequency_penalty: Annotated[float | None, _setting("Taken off a logit for each time its token was said.")] = None
    presence_penalty: Annotated[float | None, _setting("Taken off the logits of tokens that were said.")] = None
    logit_bias: Annotated[list[str] | None, _setting("Added to a token's logit (repeatable).", metavar="ID=NUMBER")] = (
        None
    )
    min_tokens: Annotated[int | None, _setting("No end before so many tokens.")] = None
    stop: Annotated[list[str] | None, _setting("End the answer at this text (repeatable).")] = None
    stop_token_ids: Annotated[
        list[int] | None, _setting("End the answer at this token (repeatable).", "--stop-token-id")
    ] = None
    model_defaults: Annotated[
        bool, _setting("Start from the settings in the model's generation_config.", "--model-defaults")
    ] = False

    def settings(self) -> dict[str, Any]:
        found = super().settings()
        del found["model_defaults"]
        if "logit_bias" in found:
            found["logit_bias"] = dict(_pair(text, "--logit-bias", "ID=NUMBER") for text in found["logit_bias"])
        return found

    def params_for(self, llm: LLM) -> SamplingParams:
        """Checked settings, on top of the model's own where they are asked for."""
        return llm.params("model" if self.model_defaults else None, **self.settings())


def template_kwargs(arguments: Sequence[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs, values as JSON, bare words as texts."""
    found: dict[str, Any] = {}
    for text in arguments or ():
        name, value = _pair(text, "--template-arg", "NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not (found and name):
        raise RequestError(f"{option} {text!r}: expected {form}")
    return name, value


def with_records(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes records of options: on the command line each of their fields is an option of its own."""
    hints = get_type_hints(command, include_extras=True)
    records = {name: kind for name, kind in hints.items() if is_dataclass(kind) and isinstance(kind, type)}
    parameters: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if name in records:
            own = get_type_hints(records[name], include_extras=True)
            parameters += [
                Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=own[field.name])
                for field in fields(records[name])
            ]
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @wraps(command)
    def run(**values: Any) -> None:
        built = {
            name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for name, kind in records.items()
        }
        command(**built, **values)

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return run
