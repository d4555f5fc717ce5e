"""evaluation/report.py and plots.py: one page that needs nothing else, and says what went wrong."""

from __future__ import annotations

import sys
from html.parser import HTMLParser

import pytest

from amphista.evaluation.curve import points
from amphista.evaluation.efficiency import efficiencies
from amphista.evaluation.metrics import summarise
from amphista.evaluation.report import html, markdown, markdown_tables, write_report
from amphista.evaluation.stretches import stretches
from tests.unit.evaluation.test_metrics import RECORDS, record


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
        "date": "2026-01-01",
        "command": "amphista evaluate own.jsonl",
    }
    return {
        "run": run,
        "measures": summarise(RECORDS, ["none", "fast"]),
        "points": points(RECORDS, ["none", "fast"]),
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
    assert "50.0% of 2" in text
    assert markdown_tables(summary).count("\n") < 10


def test_the_page_is_whole_and_safe(summary):
    page = Page()
    text = html(summary)
    page.feed(text)
    assert page.tags.count("svg") == 5 and page.links == []
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


def test_where_the_time_goes(summary):
    phases = {"prefill": 1.0, "draft": 0.2, "tree": 0.1, "verify": 1.2, "accept": 0.1, "commit": 0.2}
    told = [
        record("none", "a1", tokens=301, seconds=301.0, tree_nodes=[1] * 300, drafted=[0] * 300),
        record("hf", "a1", tokens=301, seconds=601.0, phase_seconds={"prefill": 1.0, "generate": 600.0}),
        record("fast", "a1", tokens=301, seconds=201.0, accepted=[1] * 150, drafted=[1] * 75 + [0] * 75,
               phase_seconds={name: 100 * s for name, s in phases.items()} | {"prefill": 1.0}),
    ]  # fmt: skip
    names = ["none", "hf", "fast"]
    costs = {"fast": {"verify_ms": [1.0, 1.0, 1.0, 1.1], "draft_ms": 0.2}}
    summary |= {
        "measures": summarise(told, names),
        "points": points(told, names),
        "efficiency": efficiencies(told, costs),
        "stretches": stretches(told, names),
    }
    text = " ".join(markdown(summary).split())
    assert "| fast | 1000.0 | 1333.33 | 133.33 | 66.67 | 800.00 | 66.67 | 133.33 | 133.33 | 30.0% |" in text
    assert "| hf | 1000.0 | 2000.00 | - | - | - | - | - | - | - |" in text
    assert "| fast | 1.67x | 1.50x | 0.90 | 1.20 | 1.33 | +0.100 | -0.100 | +0.133 |" in text
    assert "| fast | - | - | - | 1.50x (1) | - |" in text
    assert "| fast | 128 to 256 | 1 | 1333.33 | 1.5 | 2.00 | 4.00 | 1.50x | 0% |" in text
    assert "| fast | all | 2.00 | - | 1.50x | 4.0 | 0% | 50% |" in text
    page = Page()
    page.feed(html(summary))
    assert page.tags.count("svg") == 6


def test_summaries_of_older_versions_have_the_tables_they_can(summary):
    del summary["points"]
    for measures in summary["measures"].values():
        for m in measures.values():
            del m["ms_per_step"]
    text = markdown(summary)
    assert "## Time by phase" not in text and "## Drafting by task" in text
