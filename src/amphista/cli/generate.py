"""amphista generate: prompts in, the target's own answers out; --compare proves and times it.

amphista generate "Why is the sky blue?"
amphista generate --prompts questions.jsonl --drafter medusa --tree 16 --json > answers.jsonl
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from amphista.cli import options


@options.with_records
def generate(
    model: options.ModelOptions,
    sampling: options.SamplingOptions,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="One answer each, by seed, seed + 1, ...; - reads standard input."),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="JSONL: 'turns' (a conversation), 'messages' or 'prompt' per line."),
    ] = None,
    system: options.System = None,
    template_arg: options.TemplateArgs = None,
    raw: Annotated[bool, typer.Option("--raw", help="Plain text, no chat template.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Decode autoregressively too: same tokens? how much faster?")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Answer so many prompts together: more tokens a second in all, each one later.")
    ] = 1,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON records to this file.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON record per answer, nothing else.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="In records: log-probabilities, of each token and so many of the best.")
    ] = None,
) -> None:
    """Answer prompts with the target's own tokens."""
    from amphista.cli.answers import AnswerJob, check_output, run_job
    from amphista.prompts import from_arguments, read_prompts
    from amphista.tree.grow import check_tree

    told: dict[str, Any] = {} if logprobs is None else {"top_logprobs": logprobs, "logprobs": True}
    checked = replace(sampling.params(), **told)  # before minutes of loading
    template = options.template_kwargs(template_arg)
    check_tree(model.tree)
    check_output(output)
    asked = from_arguments(prompts or [], sys.stdin) + (read_prompts(prompts_file) if prompts_file else [])
    if not asked:
        raise typer.BadParameter("give at least one PROMPT, or --prompts FILE.jsonl")
    if compare and batch_size > 1:
        raise typer.BadParameter("--compare times one answer at a time: leave out --batch-size")
    llm = model.load(checked)
    run_job(
        AnswerJob(
            llm=llm,
            prompts=asked,
            params=replace(sampling.params_for(llm), **told),
            system=system,
            raw=raw,
            template=template,
            compare=compare,
            output=output,
            json_lines=json_lines,
            batch_size=batch_size,
        )
    )
