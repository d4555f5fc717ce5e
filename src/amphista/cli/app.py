"""The command line: names -> commands. Each command lives in one thin file and imports the library only when called.

Errors a user can cure end with one sentence on standard error and exit code 2; anything else is a defect and keeps
its trace. Ctrl-C exits with 130.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from amphista.cli.calibrate import calibrate
from amphista.cli.chat import chat
from amphista.cli.convert import convert
from amphista.cli.distill import distill
from amphista.cli.evaluate import evaluate
from amphista.cli.export import export
from amphista.cli.generate import generate
from amphista.cli.info import info
from amphista.cli.latency import latency
from amphista.cli.serve import serve
from amphista.cli.standard import FULL, logging_to_stderr, prepare
from amphista.cli.train import train
from amphista.cli.tune import tune
from amphista.errors import AmphistaError

SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "rich",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(
    name="amphista",
    help="Amphista: the same tokens as your language model, sooner.\n\n"
    "Start with: amphista generate --compare 'Why is the sky blue?'",
    **SETTINGS,
)
dev = typer.Typer(help="For those who make drafters and measure them.", **SETTINGS)
for command in (generate, chat, serve, train, distill, evaluate, convert, info):
    app.command()(command)
for command in (calibrate, export, latency, tune):
    dev.command()(command)
app.add_typer(dev, name="dev")


def _version(asked: bool) -> None:
    if asked:
        from amphista.provenance import versions

        print(f"amphista {versions()['amphista']}")
        raise typer.Exit


@app.callback()
def _amphista(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""


EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Entry point of the `amphista` script."""
    prepare()
    try:
        with logging_to_stderr():
            app()
    except AmphistaError as error:
        print(f"amphista: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if error.errno not in FULL:
            raise
        what = "" if error.filename is None else f" {error.filename}"
        print(f"amphista: cannot write{what}: {error.strerror}; free some space and try again", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("amphista: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
