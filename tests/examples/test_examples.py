"""Every script of examples/ runs, on a tiny target, and what it prints is true."""

from __future__ import annotations

import io
import re
import runpy
from pathlib import Path

import pytest

from tests.talkative import talkative_model
from tests.tiny import byte_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_LINES = 40
LONGER = {"tour.py"}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A saved target that answers in printable characters."""
    folder = tmp_path_factory.mktemp("examples-target")
    talkative_model(end_bias=-1e4).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script by name in this process; what it printed."""

    def run(name, *arguments, stdin=""):
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def tau(printed):
    return float(re.search(r"([\d.]+) tokens per target forward", printed)[1])


def test_generate(run, target):
    printed = run("generate", target)
    assert tau(printed) >= 1 and printed.count("True") == 2


def test_stream(run, target):
    whole, steps = run("stream", target).rsplit("length: 64 tokens\n", 1)
    assert whole.strip() and steps.replace("|", "").strip() in whole.replace("|", "")
    assert 1 <= steps.count("|") <= 64


def test_batch(run, target):
    printed = run("batch", target)
    assert "alone and in a batch: True" in printed and "Name three colours.\n  " in printed


def test_chat(run, target):
    printed = run("chat", target, stdin="Hello\n\nAnd then?\n")
    assert printed.endswith("5 messages\n")


def test_own_drafter(run, target):
    assert tau(run("own_drafter", target)) > 1


def test_serve(run, target):
    """A server in a process of its own, which ends with the script."""
    text, told = run("serve", target, "lookup").rsplit("\n", 2)[:2]
    assert len(text) == 64 and told == "the same text as plain decoding: True"


def test_train_tiny(run, target, tmp_path):
    printed = run("train_tiny", tmp_path, target)
    assert "validation at step" in printed and tau(printed) >= 1
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


def test_tour(run, tmp_path):
    """At its shortest: the curve has eight points and rises, and the tokens are those of plain decoding."""
    printed = run("tour", tmp_path, 0.02)
    curve = [float(tau) for tau in re.findall(r": ([\d.]+) tokens per forward #", printed)]
    assert len(curve) == 8 and curve[-1] > curve[0]
    assert tau(printed) > 1.2 and "as plain decoding: True" in printed


def test_every_example_is_short_and_tested():
    scripts = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert scripts
    too_long = {name for name, text in scripts.items() if len(text.splitlines()) > MOST_LINES} - LONGER
    assert not too_long
    here = Path(__file__).read_text()
    untested = [name for name in scripts if f'run("{name.removesuffix(".py")}"' not in here]
    assert not untested
