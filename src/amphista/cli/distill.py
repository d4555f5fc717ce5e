"""amphista distill: the target's own answers to prompts, as training rows.

amphista distill --prompts prompts.jsonl.gz --out runs/answers
amphista train --data runs/answers --out runs/amphista
torchrun --nproc-per-node 4 -m amphista distill --prompts prompts.jsonl.gz --out runs/answers
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amphista.cli import options
from amphista.cli.launched import own_device
from amphista.target import DEFAULT_TARGET

if TYPE_CHECKING:
    from amphista.train.distill import Share

Drafter = Annotated[
    str | None,
    typer.Option(help="Drafts answers where that pays, and changes none: as for generate.", show_default=False),
]


def distill(
    out: Annotated[Path, typer.Option(help="Folder for the rows; the same command goes on after a kill.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="JSONL (.gz) with messages, turns or prompt per line, or a data set owner/name[:split]; repeatable."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N conversations; more may follow later.")] = None,
    target: options.Target = DEFAULT_TARGET,
    device: options.Device = None,
    dtype: options.Dtype = None,
    fast: options.Fast = True,
    drafter: Drafter = None,
    batch_size: Annotated[int | None, typer.Option(help="Conversations answered at a time. Default 32.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="At most this many tokens an answer. Default 512.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampled conversations. Default 0.7.")] = None,
    sampled_share: Annotated[
        float | None, typer.Option(help="Share of conversations sampled; the others are greedy. Default 0.5.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers. Default 0.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Answer every Nth conversation, from the Ith (from 0). Default: RANK/WORLD_SIZE."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file with what differs from the defaults.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. cut_loops=false; repeatable."),
    ] = None,
    json_lines: Annotated[
        bool, typer.Option("--json", help="Print the summary as one JSON object at the end.")
    ] = False,
) -> None:
    """Let the target answer prompts; OUT is ready for `amphista train --data`."""
    from amphista.config import apply_overrides, build, read_recipe
    from amphista.train.distill import DistillConfig, Share

    values = apply_overrides(read_recipe(recipe) if recipe else {}, settings or [])
    given = {
        "prompts": tuple(prompts) if prompts else None,
        "limit": limit,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "sampled_share": sampled_share,
        "seed": seed,
    }
    values |= {name: value for name, value in given.items() if value is not None}
    config = build(DistillConfig, values)
    share = Share.from_environment(os.environ) if shard is None else Share.parse(shard)
    summary = _run(config, share, (target, own_device(device), dtype, fast), out, drafter)
    if json_lines:
        print(json.dumps({"out": str(out), **summary}))


def _run(
    config: Any, share: Share, target: tuple[str, str | None, str | None, bool], out: Path, drafter: str | None
) -> dict[str, Any]:
    """Read the prompts, load the target (its name, device, dtype, fast or not), answer."""
    from amphista.cli.progress import StepProgress
    from amphista.cli.standard import resumable
    from amphista.llm import choose_drafter
    from amphista.target.loading import load_target
    from amphista.train.conversations import load_conversations
    from amphista.train.distill import Distiller

    asked = load_conversations(config.prompts, config.limit)
    if asked.left_out.count:
        print(f"amphista: {asked.left_out.sentence()}", file=sys.stderr)
    name, device, dtype, fast = target
    loaded = load_target(name, device=device, dtype=dtype, fast=fast)
    with resumable(out), StepProgress() as progress:
        proposer = choose_drafter(loaded, drafter)
        distiller = Distiller(loaded, config, asked, out, proposer=proposer, share=share, on_step=progress.step)
        summary = distiller.run()
    print(
        f"amphista: {summary['conversations']} conversations, {summary['answer_tokens']} answer tokens in {out} "
        f"({summary['tokens_per_second']} tokens/s in this run); train with: amphista train --data {out} --out DIR",
        file=sys.stderr,
    )
    for reason, count in summary["skipped"].items():
        print(f"amphista: {count} skipped: {reason}", file=sys.stderr)
    return summary
