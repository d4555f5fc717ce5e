"""mkdocs hooks: pages that are made when the site is built, from the commands and from files beside this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File

from amphista.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = {"benchmarks/README.md": "benchmarks.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are no files in docs/."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "cli.md", content="\n".join(_reference())))
    return files


def on_page_markdown(markdown: str, **about: Any) -> str:
    """Links to files that have become pages."""
    for source, name in PAGES.items():
        markdown = markdown.replace(f"](../{source})", f"]({name})")
    return markdown.replace("](docs/", "](")


def _reference() -> Iterator[str]:
    yield "# Command line\n\nMade from the commands themselves; `amphista COMMAND --help` says the same.\n"
    root = typer.main.get_command(app)
    yield from _commands(root, "amphista")


def _commands(command: Any, name: str) -> Iterator[str]:
    for child_name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, f"{name} {child_name}")
    if getattr(command, "commands", None):
        return
    arguments = " ".join(p.name.upper() for p in command.params if p.param_type_name == "argument")
    yield f"## {name}\n\n{command.help}\n\n    {name} {arguments} [OPTIONS]\n"
    yield "| option | meaning | default |\n|---|---|---|"
    for parameter in command.params:
        names = ", ".join(f"`{one}`" for one in [*parameter.opts, *parameter.secondary_opts])
        text = (getattr(parameter, "help", None) or "").replace("|", "\\|").replace("\n", " ")
        default = "required" if parameter.required else _shown(parameter.default)
        yield f"| {names} | {text} | {default} |"
    yield ""


def _shown(default: Any) -> str:
    return "" if default in (None, False, True) or not isinstance(default, str | int | float) else f"`{default}`"
