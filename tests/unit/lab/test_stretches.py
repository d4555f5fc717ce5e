"""benchmarks/lab/stretches.py: every step in its stretch, once."""

from __future__ import annotations

import pytest

from benchmarks.lab.stretches import by_stretch, edges, stretches
from tests.unit.evaluation.test_metrics import record


def test_stretches_double():
    assert edges(1) == edges(128) == [(0, 128)]
    assert edges(129) == [(0, 128), (128, 256)]
    assert edges(1024) == [(0, 128), (128, 256), (256, 512), (512, 1024)]


def long_record(method, accepted, each, **fields):
    tokens = 1 + sum(accepted) + len(accepted)
    base = dict(accepted=accepted, step_seconds=[each] * len(accepted), tree_nodes=[3] * len(accepted))
    return record(method, "a1", tokens=tokens, seconds=1 + each * len(accepted), **base | fields)


def test_a_step_belongs_to_where_it_begins():
    """1 token of the prefill, 63 steps of two: the last begins at 125. Then one at 127, which crosses the edge."""
    sums = by_stretch(long_record("fast", [1] * 63 + [4] + [0] * 8, 0.01))
    assert (sums[0].steps, sums[0].tokens) == (64, 63 * 2 + 5)
    assert (sums[1].steps, sums[1].tokens, sums[1].nodes) == (8, 8, 24)
    assert sums[1].seconds == pytest.approx(0.08) and sums[0].looping == 0


def test_by_hand():
    plain = long_record("none", [0] * 255, 0.02, tree_nodes=[1] * 255)
    fast = long_record("fast", [1] * 127 + [0], 0.025)  # 256 tokens
    found = stretches([plain, fast], ["none", "fast"])
    assert [(s["method"], s["start"], s["end"]) for s in found] == [
        ("none", 0, 128),
        ("none", 128, 256),
        ("fast", 0, 128),
        ("fast", 128, 256),
    ]
    assert [s["num_steps"] for s in found] == [127, 128, 64, 64]
    assert all(s["ms_per_step"] == pytest.approx(20) for s in found[:2])
    assert found[1]["speedup"] == 1.0 and found[1]["tau"] == 1.0
    assert found[2]["ms_per_step"] == pytest.approx(25) and found[2]["mean_tree_nodes"] == 3
    assert found[2]["tokens_per_second"] == pytest.approx(80) and found[2]["speedup"] == pytest.approx(80 / 50)
    assert found[3]["tau"] == pytest.approx(127 / 64)


def test_tokens_behind_the_start_of_a_loop_are_told():
    ids = [*range(100), *[7] * 100]  # the loop's first 7 is still free of it: 101 tokens
    found = stretches([long_record("none", [0] * 199, 0.01, token_ids=ids)], ["none"])
    assert [s["looping"] for s in found] == pytest.approx([27 / 127, 1.0])


def test_short_and_failed_answers_have_none():
    assert stretches([long_record("none", [0] * 127, 0.01)], ["none"]) == []
    assert stretches([long_record("none", [0] * 300, 0.01, error="x")], ["none"]) == []


def test_without_the_baseline_there_is_no_speedup():
    found = stretches([long_record("fast", [0] * 150, 0.01)], ["none", "fast"])
    assert [s["speedup"] for s in found] == [None, None]
