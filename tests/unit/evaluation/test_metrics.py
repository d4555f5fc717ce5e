"""evaluation/metrics.py: the numbers, worked out by hand."""

from __future__ import annotations

import pytest

from amphista.evaluation.metrics import contract, decode_only, loop_free, speedup_over, summarise, whole
from amphista.evaluation.records import Record


def record(method, question, *, tokens, seconds, accepted=None, **fields):
    """`tokens` distinct tokens, one second of prefill, the rest spread over the steps."""
    accepted = [0] * (tokens - 1) if accepted is None else accepted
    each = (seconds - 1) / len(accepted) if accepted else 0.0
    base = dict(
        id=question,
        category="c",
        task="t" + question[0],
        turn=0,
        repeat=0,
        method=method,
        seed=1,
        token_ids=list(range(tokens)),
        accepted=accepted,
        tree_nodes=[1 if method == "none" else 4] * len(accepted),
        step_seconds=[each] * len(accepted),
        seconds=seconds,
        prefill_seconds=1.0,
        phase_seconds={"prefill": 1.0, "verify": seconds - 1},
        matches=None if method == "none" else True,
    )
    return Record(**base | fields)


RECORDS = [
    record("none", "a1", tokens=5, seconds=5.0),
    record("fast", "a1", tokens=5, seconds=3.0, accepted=[1, 1]),
    record("none", "b1", tokens=7, seconds=13.0),
    record(
        "fast",
        "b1",
        tokens=7,
        seconds=4.0,
        accepted=[2, 0, 1],
        matches=False,
        divergence={"position": 2, "margin": 1e-6},
    ),
    record("none", "b2", tokens=9, seconds=9.0),
    record("fast", "b2", tokens=0, seconds=0.0, accepted=[], error="RuntimeError: broken", matches=False),
]


def test_by_hand():
    summary = summarise(RECORDS, ["none", "fast"])
    assert list(summary) == ["all", "ta", "tb"]
    none, fast = summary["all"]["none"], summary["all"]["fast"]
    assert (none["tau"], none["speedup"], none["speedup_interval"], none["identical"]) == (1.0, 1.0, (1.0, 1.0), 1.0)
    assert none["tokens_per_second"] == pytest.approx(21 / 27)
    assert (fast["num_answers"], fast["failed"], fast["num_tokens"], fast["num_steps"]) == (2, 1, 12, 5)
    assert fast["tau"] == pytest.approx((4 + 6) / 5)
    assert fast["tokens_per_second"] == pytest.approx(12 / 7)
    assert fast["decode_tokens_per_second"] == pytest.approx(10 / 5)
    assert fast["speedup"] == pytest.approx((12 / 7) / (12 / 18))  # b2 failed, so it counts on neither side
    assert fast["decode_speedup"] == pytest.approx((10 / 5) / (10 / 16))
    assert fast["identical"] == pytest.approx(1 / 3) and fast["compared"] == 3, "a crash has not the same tokens"
    assert fast["acceptance_by_depth"] == [0.8, 0.2]
    assert fast["mean_tree_nodes"] == 4 and none["mean_tree_nodes"] == 1
    assert fast["phase_seconds"] == {"prefill": 2.0, "verify": 5.0}
    assert fast["speedup_hf"] is None
    low, high = fast["speedup_interval"]
    assert low == pytest.approx(5 / 3) and high == pytest.approx(13 / 4)  # two questions: the extremes are each alone
    assert summary["ta"]["fast"]["speedup"] == pytest.approx(5 / 3)


def test_nothing_but_failures_gives_no_number():
    bad = record("bad", "a1", tokens=0, seconds=0, error="x", matches=False)
    failed = [record("none", "a1", tokens=3, seconds=3.0), bad]
    bad = summarise(failed, ["none", "bad"])["all"]["bad"]
    assert bad["failed"] == 1 and bad["num_answers"] == 0
    for key in ("tau", "tau_loop_free", "tokens_per_second", "speedup", "speedup_interval"):
        assert bad[key] is None
    assert (bad["identical"], bad["compared"]) == (0, 1)


def test_one_token_answers_are_plain_by_definition():
    one = [record("none", "a1", tokens=1, seconds=1.0), record("hf", "a1", tokens=1, seconds=1.0)]
    summary = summarise(one, ["none", "hf"])["all"]
    assert summary["none"]["tau"] == summary["hf"]["tau"] == 1.0
    assert summary["hf"]["decode_speedup"] is None


def test_the_loop_free_prefix_is_timed_by_its_steps():
    ids = [1, 2, 3, *[7] * 30]
    looping = record(
        "fast", "a1", tokens=5, seconds=9.0, token_ids=ids, accepted=[1, 2, 14, 15], step_seconds=[2.0] * 4
    )
    assert loop_free(looping).tokens == 4 and loop_free(looping).seconds == 1 + 2 * 2.0
    assert whole(looping).tokens == 33 and decode_only(looping).seconds == 8.0


def test_tokens_of_a_drafting_prefill_count_for_no_step():
    lookup = record("hf-lookup", "a1", tokens=8, seconds=5.0, accepted=[1, 2], prefill_tokens=3)
    assert summarise([lookup], ["hf-lookup"])["all"]["hf-lookup"]["tau"] == 2.5


def test_the_interval_resamples_questions_not_answers():
    rows = [record("none", q, tokens=5, seconds=5.0, repeat=r) for q in ("a1", "a2") for r in range(20)]
    ours = [record("fast", q, tokens=5, seconds=s, repeat=r) for q, s in (("a1", 2.0), ("a2", 4.0)) for r in range(20)]
    speedup, interval = speedup_over(ours, rows, whole)
    assert speedup == pytest.approx(10 / 6) and interval == pytest.approx((5 / 4, 5 / 2))
    assert speedup_over([], rows, whole) == (None, None)


def test_the_contract():
    found = contract(summarise(RECORDS, ["none", "fast"]), 3)
    assert found["questions"] == 3 and list(found["methods"]) == ["none", "fast"]
    assert set(found["methods"]["fast"]) == {
        "num_answers",
        "compared",
        "tau",
        "tau_loop_free",
        "tokens_per_second",
        "decode_tokens_per_second",
        "speedup",
        "speedup_interval",
        "decode_speedup",
        "speedup_hf",
        "identical",
        "num_tokens",
        "failed",
    }


def test_expected_tau_is_the_mean_over_all_steps():
    told = [record("fast", "a1", tokens=5, seconds=3.0, accepted=[1, 1], expected=[0.5, 1.5])]
    told.append(record("fast", "b1", tokens=3, seconds=3.0, accepted=[1], expected=[0.4]))
    assert summarise(told, ["fast"])["all"]["fast"]["expected_tau"] == pytest.approx(1 + 2.4 / 3)
    assert summarise(RECORDS, ["none", "fast"])["all"]["fast"]["expected_tau"] is None, "older records do not say"
