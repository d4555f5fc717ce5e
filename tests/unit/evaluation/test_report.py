"""evaluation/report.py and plots.py: one page that needs nothing else, and says what went wrong."""

from __future__ import annotations

import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from amphista.evaluation.metrics import summarise
from amphista.evaluation.report import html, markdown, markdown_tables, write_report
from tests.unit.evaluation.test_metrics import RECORDS


@pytest.fixture
def summary():
    run = {
        "settings": {
            "target": "tiny",
            "dtype": "float32",
            "questions": {"name": "own.jsonl", "count": 3, "full_size": 9},
            "methods": {"none": {"engine": "amphista"}, "fast": {"drafter": "<b>bold</b>", "drafter_sha256": "ab"}},
            "params": {"temperature": 0.7, "max_new_tokens": 8},
            "repeats": 1,
        },
        "machine": {"processor": "Some CPU", "torch_threads": 2, "instruction_set": "AVX2"},
        "versions": {"torch": "2", "transformers": "5", "amphista": "0"},
        "git": "abc",
        "drafters": {"fast": "best"},
        "date": "2026-01-01",
        "command": "amphista evaluate own.jsonl",
    }
    return {
        "run": run,
        "measures": summarise(RECORDS, ["none", "fast"]),
        "divergences": [
            {"method": "fast", "id": "b1", "turn": 0, "position": 4, "margin": 2e-6},
            {"method": "fast", "id": "b1", "turn": 1, "position": 0, "margin": None, "earlier_turn": True},
            *[{"method": "fast", "id": f"n{i}", "turn": 0, "position": 1, "margin": None} for i in range(40)],
        ],
        "failures": [{"method": "fast", "id": "b2", "turn": 0, "error": "RuntimeError: <script>x</script>"}],
        "samples": [{"id": "a1", "task": "ta", "method": "fast", "tau": 2.5, "tokens": [["<Hi", 0], [" there", 1]]}],
        "notes": ["1 of 6 records failed."],
    }


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]


def test_markdown_says_it_all(summary):
    text = markdown(summary)
    assert text.startswith("# tiny on own.jsonl: 3 of 9 questions, temperature 0.7")
    assert "| fast   | 2.00 | 2.00          | 1.7      | 2.57x (1.67 to 3.25) |" in text
    assert "fast, question b1, turn 1: differs from token 4 on, margin 2e-06" in text
    assert "turn 2: another prompt, because an earlier turn diverged" in text and "no second choice" in text
    assert "and 12 more in summary.json" in text
    assert "fast, question b2, turn 1: RuntimeError" in text and "1 of 6 records failed." in text
    assert "33.3% of 3" in text and "1 of 3" in text
    assert markdown_tables(summary).count("\n") < 10
    assert "amphista 0 at abc, 2026" in text and "- `fast`: drafter <b>bold</b>, from best\n" in text
    summary["run"]["git"] = None
    assert "amphista 0, 2026" in markdown(summary)


def test_the_page_is_whole_and_safe(summary):
    page = Page()
    text = html(summary)
    page.feed(text)
    assert page.tags.count("svg") == 3 and page.links == []
    assert "<script" not in text and "&lt;script&gt;" in text and "&lt;b&gt;bold" in text
    assert "<mark> there</mark>" in text and "&lt;Hi" in text
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_the_same_summary_gives_the_same_files(summary, tmp_path):
    write_report(tmp_path, summary)
    before = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path, summary)
    assert (tmp_path / "report.html").read_bytes() == before


def test_without_matplotlib_the_page_says_so(summary, monkeypatch):
    monkeypatch.delitem(sys.modules, "amphista.evaluation.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = html(summary)
    assert "<svg" not in text and "pip install &#39;amphista[eval]&#39;" in text.replace("'", "&#39;")


@pytest.mark.parametrize("task", ["all", "other"])
def test_figures_of_questions_without_categories_and_of_nothing_but_failures(summary, task):
    for failed in (False, True):
        records = [replace(r, task=task, error="x" if failed and r.method == "fast" else r.error) for r in RECORDS]
        summary["measures"] = summarise(records, ["none", "fast"])
        page = html(summary)
        assert page.count("<svg") == 3 and page.count("<!-- fast -->") >= (1 if failed else 3)
