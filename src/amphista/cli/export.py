"""amphista dev export: a folder through which another program decodes with amphista.

amphista dev export transformers runs/custom-generate
amphista dev export transformers runs/custom-generate --drafter runs/amphista/best
amphista dev export vllm runs/vllm
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Drafter = Annotated[
    str | None,
    typer.Option(
        help="What drafts, as for generate; for vllm heads alone, a shipped name (amphista, medusa), a folder or a hub "
        "id. Default: for vllm amphista, for transformers amphista+lookup where one is shipped, else lookup."
    ),
]


class Program(StrEnum):
    """For whom."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


GENERATE = '''"""Decode with amphista on this model: the same tokens as its plain decoding, sooner."""

from amphista.custom_generate import generate as decode


def generate(model, *, drafter={drafter!r}, **arguments):
    return decode(model, drafter=drafter, **arguments)
'''
PROPOSER = '''"""Drafts of amphista inside vLLM, as a chain. With this folder on PYTHONPATH:

    vllm serve TARGET --speculative-config \\
        '{{"method": "custom_class", "model": "{module}.Proposer", "num_speculative_tokens": {num_tokens}}}'
"""

from amphista.vllm_proposer import ChainProposer


class Proposer(ChainProposer):
    drafter = {drafter!r}
'''
MODULE, NUM_TOKENS = "amphista_drafts", 4
CARD = """---
library_name: transformers
tags: [custom_generate, speculative-decoding]
---

`pip install amphista`, then, with a causal LM and tokens of your own:

    model.generate(**tokens, custom_generate="THIS FOLDER", trust_remote_code=True, max_new_tokens=64)

The tokens are those of plain decoding; a drafter proposes them ahead and the model checks several in one forward.
"""


def export(
    program: Annotated[Program, typer.Argument(help="The program that shall decode with amphista.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: what custom_generate= names, or goes on PYTHONPATH.")],
    drafter: Drafter = None,
) -> None:
    """Write a folder through which transformers' own generate, or vLLM, decodes with our drafts on its own model."""
    from amphista.errors import ConfigError

    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: give another folder")
    if program is Program.VLLM:
        _for_vllm(out, _found(drafter or "amphista", needs_heads=True))
    else:
        _for_transformers(out, drafter and _found(drafter))


def _found(drafter: str, *, needs_heads: bool = False) -> str:
    """The name as the other program will find it: a folder in full. raises DrafterError for what it would refuse."""
    from amphista.drafter.checkpoint import DRAFTERS, local_checkpoint, shipped_checkpoints
    from amphista.drafter.proposer import NONE, parts_of
    from amphista.errors import DrafterError

    heads, use_lookup = parts_of(drafter)
    if needs_heads and (use_lookup or heads == NONE):
        raise DrafterError(
            f"vLLM takes heads alone, not {drafter!r}: give a drafter with heads; lookup is its own method 'ngram'"
        )
    if heads in DRAFTERS and heads not in shipped_checkpoints():
        raise DrafterError(f"no {heads} drafter is shipped: give a folder or a hub id, or train one")
    if heads in (NONE, *DRAFTERS) or (checkpoint := local_checkpoint(heads)) is None:
        return drafter
    return f"{checkpoint.folder.resolve()}{'+lookup' if use_lookup else ''}"


def _for_transformers(out: Path, drafter: str | None) -> None:
    from amphista.files import write_file
    from amphista.provenance import versions

    folder = out / "custom_generate"
    folder.mkdir(parents=True)
    write_file(folder / "generate.py", GENERATE.format(drafter=drafter))
    write_file(folder / "requirements.txt", f"amphista>={versions()['amphista']}\n")
    write_file(out / "README.md", CARD)
    print(f'model.generate(..., custom_generate="{out}", trust_remote_code=True)')


def _for_vllm(out: Path, drafter: str) -> None:
    from amphista.files import write_file

    out.mkdir(parents=True, exist_ok=True)
    write_file(out / f"{MODULE}.py", PROPOSER.format(module=MODULE, num_tokens=NUM_TOKENS, drafter=drafter))
    settings = {"method": "custom_class", "model": f"{MODULE}.Proposer", "num_speculative_tokens": NUM_TOKENS}
    print(f"PYTHONPATH={out.resolve()} vllm serve TARGET --speculative-config '{json.dumps(settings)}'")
