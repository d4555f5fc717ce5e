from __future__ import annotations

import asyncio

import pytest

from benchmarks.lab.load import Answer, Load, Run, Server, run, told
from tests.serve.serving import KEYS, serving, talkative_llm


def test_servers_are_named():
    assert Server.of("a=http://x:1") == Server("a", "http://x:1", {})
    assert Server.of("b=http://x:1,none").extra == {"amphista": {"drafter": "none"}}


def test_a_closed_loop_over_a_real_server():
    prompts = [f"Prompt number {n}" for n in range(6)]
    load = Load(prompts, 12, KEYS[0])
    with serving(talkative_llm(), max_running=2, max_waiting=1) as served:  # some are told to come again
        runs = [
            [asyncio.run(run(Server.of(f"x={served.url}{drafter}"), load, concurrency, 0.7, f"{drafter}{concurrency}"))]
            for drafter, concurrency in (("", 5), (",none", 1))
        ]
    row = told("x", *runs)
    assert row["same_texts"] == row["answers"] == 6
    for answer in runs[0][0].answers:
        assert answer.num_tokens == 12 and 8 < len(answer.text) <= 12 and 0 < answer.first <= answer.last


def test_figures():
    quick = Run([Answer(0.1, 1.1, 11, "a"), Answer(0.2, 1.2, 11, "b")], 2.0)
    slow = Run([Answer(0.1, 2.2, 11, "a"), Answer(0.2, 1.2, 11, "c")], 4.0)
    row = told("quick", [quick], [slow])
    assert row["tokens_per_second"] == 11 and row["over_last"] == 2 and row["same_texts"] == 1
    assert row["tpot_ms"]["p50"] == pytest.approx(100) and row["ttft_ms"] == {"p50": 200, "p95": 200, "p99": 200}
    assert row["slowest_5_percent_over_last"] == 1
