"""Progress of long commands: a bar with the time left on a terminal, lines elsewhere, nothing from other processes."""

from __future__ import annotations

import io
import sys
import time

import pytest

from amphista.cli.progress import StepProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, **options):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with StepProgress(**options) as progress:
        progress.line("[a line]")
        for done in (5, 6, 7):
            progress.step(done, 10, f"loss {1 / done:.2f}")
            time.sleep(0.15)  # the bar is drawn ten times a second
    return stream.getvalue()


def test_a_terminal_sees_a_bar_with_the_time_left(monkeypatch):
    """Steps done before a resume are no pace: three steps in 0.3 s are not 7."""
    text = shown(monkeypatch, Terminal())
    assert "[a line]" in text and "7/10" in text and "loss 0.14" in text and "0:00:0" in text


def test_elsewhere_every_step_is_a_line(monkeypatch):
    text = shown(monkeypatch, io.StringIO())
    assert text.splitlines() == ["[a line]", "step 5/10  loss 0.20", "step 6/10  loss 0.17", "step 7/10  loss 0.14"]


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_other_processes_are_silent(monkeypatch, stream):
    assert shown(monkeypatch, stream(), is_shown=False) == ""
