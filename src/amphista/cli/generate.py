"""amphista generate: prompts in, the target's own answers out; --compare proves and times it.

amphista generate "Why is the sky blue?"
amphista generate --prompts questions.jsonl --drafter medusa --tree 16 --json > answers.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from amphista.cli import options
from amphista.target import DEFAULT_TARGET


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="One answer each; - reads standard input.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="JSONL: 'turns' (a conversation), 'messages' or 'prompt' per line."),
    ] = None,
    target: options.Target = DEFAULT_TARGET,
    drafter: options.Drafter = None,
    allow_other_target: options.AllowOtherTarget = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    fast: options.Fast = True,
    tree: options.Tree = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    system: options.System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Plain text, no chat template.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode autoregressively too: same tokens? how much faster?")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON records to this file.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON record per answer, nothing else.")] = False,
) -> None:
    """Answer prompts with the target's own tokens."""
    from amphista.cli.answers import Job, check_output, run_job
    from amphista.llm import load
    from amphista.prompts import from_arguments, read_prompts
    from amphista.tree.grow import check_tree

    params = options.sampling_params(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    check_tree(tree)
    check_output(output)
    asked = from_arguments(prompts or [], sys.stdin) + (read_prompts(prompts_file) if prompts_file else [])
    if not asked:
        raise typer.BadParameter("give at least one PROMPT, or --prompts FILE.jsonl")
    llm = load(target, drafter, tree=tree, device=device, dtype=dtype, fast=fast, allow_other_target=allow_other_target)
    run_job(Job(llm, asked, params, system=system, raw=raw, compare=compare, output=output, json_lines=json_lines))
