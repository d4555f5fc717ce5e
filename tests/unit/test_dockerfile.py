"""The Dockerfile, as far as it can be read without docker: what it copies, installs and starts is there."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

from typer.testing import CliRunner

from amphista.cli.app import app
from amphista.errors import ConfigError

ROOT = Path(__file__).parents[2]
TEXT = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
STEPS = [tuple(line.split(" ", 1)) for line in TEXT.splitlines() if line and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def told(kind):
    return [text for name, text in STEPS if name == kind]


def test_what_is_copied_exists_and_is_all_that_the_package_is_made_of():
    sources = [name for text in told("COPY") for name in text.split()[:-1]]
    assert all((ROOT / name).exists() for name in sources)
    assert {"src", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= set(sources)


def test_what_is_installed_is_pinned_and_known():
    installs = re.findall(r"pip install (.*?)(?=&&|$)", " ".join(told("RUN")))
    words = [word for line in installs for word in shlex.split(line)]
    pins = dict(re.findall(r"(?m)^([\w.-]+)==([^ ;\n]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8")))
    assert f"TORCH=torch=={pins['torch']}" in told("ARG") and "$TORCH" in words
    assert words.count("constraints.txt") == len(installs) == 2
    (extra,) = (word for word in words if word.startswith(".["))
    assert extra.strip(".[]") in PROJECT["optional-dependencies"]
    python = told("FROM")[0].removeprefix("python:").removesuffix("-slim")
    assert PROJECT["requires-python"] == f">={python}"


def test_it_serves_as_nobody_in_particular_and_not_without_a_key(monkeypatch):
    monkeypatch.delenv("AMPHISTA_API_KEY", raising=False)
    names = [name for name, _ in STEPS]
    assert told("USER") == ["amphista"] and names.index("USER") < names.index("ENTRYPOINT")
    program, *options = json.loads(told("ENTRYPOINT")[0])
    assert program in PROJECT["scripts"]
    result = CliRunner().invoke(app, options)
    assert isinstance(result.exception, ConfigError) and "--api-key" in str(result.exception)
