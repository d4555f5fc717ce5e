"""Options that several commands share, declared once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from amphista.engine.params import SamplingParams

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
        help="float32, bfloat16, float16, or int8 (weights of 8 bits, on CPU: another target, exact against itself). "
        "Default: float32 on CPU, else the model's.",
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
Tree = Annotated[
    str | None,
    typer.Option(
        metavar="auto|chain|N|static:N|FILE",
        help="auto: as large as pays here, in each step (measured once, `amphista tune` shows it); chain; N nodes "
        "chosen anew in each step (root included, 1 is plain decoding); static:N from the drafter's calibration; or "
        "a template file. Default auto.",
        rich_help_panel=TREE,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="At most this many tokens an answer.", rich_help_panel=SAMPLING)]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)]
TopK = Annotated[int, typer.Option(help="Keep the k best tokens; 0 is off.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float, typer.Option(help="Keep the best tokens holding this probability; 1 is off.", rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float,
    typer.Option(
        help="Drop tokens below this share of the best one's probability; 0 is off.", rich_help_panel=SAMPLING
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1 makes tokens already there less likely; 1 is off.", rich_help_panel=SAMPLING)
]
Seed = Annotated[int, typer.Option(help="Same seed, same text, whatever drafter or tree.", rich_help_panel=SAMPLING)]
Stop = Annotated[
    list[str] | None, typer.Option(help="End the answer at this text (repeatable).", rich_help_panel=SAMPLING)
]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        "--ignore-eos",
        help="Decode on behind end tokens, to --max-new-tokens: for measuring long answers.",
        rich_help_panel=SAMPLING,
    ),
]
System = Annotated[str | None, typer.Option(help="System message.", rich_help_panel=SAMPLING)]


def sampling_params(
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    stop: list[str] | None,
    ignore_eos: bool = False,
) -> SamplingParams:
    """Checked sampling settings; a model's generation_config never sets any of them."""
    from amphista.engine.params import SamplingParams

    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
