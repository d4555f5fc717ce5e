from __future__ import annotations

from functools import partial

import pytest

from benchmarks.lab.load import Answer, Asked, System, exactly, one_round, server, told
from tests.serve.serving import serving, talkative_llm


def test_a_closed_loop_over_a_real_server():
    requests = [Asked(f"Prompt number {n}", 12, 0.7, "salt") for n in range(6)]
    with serving(talkative_llm(), api_keys=(), max_running=2) as served:
        port = int(served.url.rsplit(":", 1)[1])
        plain = partial(exactly, amphista={"drafter": "none"})
        drafted, alone = System("drafted", server(port)), System("alone", server(port, plain))
        runs = {"drafted": [one_round(drafted, requests, 5)], "alone": [one_round(alone, requests, 1)]}
    row = told("alone", runs)
    assert row["same_texts"] == row["answers"] == 6 and row["refused"] == 0
    for answer in runs["drafted"][0][0]:
        assert answer.num_tokens == 12 and 8 < len(answer.text) <= 12 and 0 < answer.first <= answer.last


def test_figures():
    quick = [Answer(0.1, 1.1, 11, "a"), Answer(0.2, 1.2, 11, "b")], 2.0
    slow = [Answer(0.1, 2.2, 11, "a"), Answer(0.2, 1.2, 11, "c")], 4.0
    row = told("quick", {"slow": [slow], "quick": [quick]})
    assert row["tokens_per_second"] == 11 and row["over"] == row["over_worst"] == 2 and row["same_texts"] == 1
    assert row["tpot_ms"]["p50"] == pytest.approx(100) and row["ttft_ms"] == {"p50": 200, "p95": 200, "p99": 200}
    assert row["over_slowest_5_percent"] == 1
