"""amphista dev export: a folder through which another program decodes with amphista.

amphista dev export transformers runs/custom-generate
amphista dev export transformers runs/custom-generate --drafter runs/amphista/best
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from amphista.cli import options


class Program(StrEnum):
    """For whom."""

    TRANSFORMERS = "transformers"


GENERATE = '''"""Decode with amphista on this model: the same tokens as its plain decoding, sooner."""

from amphista.custom_generate import generate as decode


def generate(model, *, drafter={drafter!r}, **arguments):
    return decode(model, drafter=drafter, **arguments)
'''
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
    out: Annotated[Path, typer.Argument(help="Folder to write; for transformers, what custom_generate= names.")],
    drafter: options.Drafter = None,
) -> None:
    """Write a folder through which transformers' own generate decodes with amphista, on the model it has loaded."""
    from amphista.errors import ConfigError
    from amphista.files import write_file
    from amphista.provenance import versions

    folder = out / "custom_generate"
    if folder.exists() or (out / "README.md").exists():
        raise ConfigError(f"{out} holds an export or a README.md already: give another folder")
    folder.mkdir(parents=True)
    if drafter is not None and Path(drafter).is_dir():
        drafter = str(Path(drafter).resolve())
    write_file(folder / "generate.py", GENERATE.format(drafter=drafter))
    write_file(folder / "requirements.txt", f"amphista>={versions()['amphista']}\n")
    write_file(out / "README.md", CARD)
    print(f'model.generate(..., custom_generate="{out}", trust_remote_code=True)')
