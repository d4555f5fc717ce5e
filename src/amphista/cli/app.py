"""The command line: names -> commands. Each command lives in one thin file and imports the library only when called.

Errors a user can cure end with one sentence on standard error and exit code 2; anything else is a defect and keeps
its trace. Ctrl-C exits with 130.
"""

from __future__ import annotations

import sys

import typer

from amphista.cli.ablate import ablate
from amphista.cli.calibrate import calibrate
from amphista.cli.chat import chat
from amphista.cli.convert import convert
from amphista.cli.distill import distill
from amphista.cli.evaluate import evaluate
from amphista.cli.generate import generate
from amphista.cli.info import info
from amphista.cli.latency import latency
from amphista.cli.push import push
from amphista.cli.report import report
from amphista.cli.train import train
from amphista.cli.tune import tune
from amphista.errors import AmphistaError

app = typer.Typer(
    name="amphista",
    help="Amphista: the same tokens as your language model, sooner.\n\n"
    "Start with: amphista generate --compare 'Why is the sky blue?'",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(generate)
app.command()(chat)
app.command()(distill)
app.command()(train)
app.command()(ablate)
app.command()(calibrate)
app.command()(convert)
app.command()(push)
app.command()(evaluate)
app.command()(report)
app.command()(latency)
app.command()(tune)
app.command()(info)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Entry point of the `amphista` script."""
    try:
        app()
    except AmphistaError as error:
        print(f"amphista: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("amphista: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
