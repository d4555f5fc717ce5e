"""evaluation/curve.py: one point a question and method, means by tau."""

from __future__ import annotations

import pytest

from amphista.evaluation.curve import bin_of, by_tau, points
from tests.unit.evaluation.test_metrics import RECORDS, record


def test_points_by_hand():
    first, second = points(RECORDS, ["none", "fast"])  # b2 failed
    assert (first["id"], first["task"], first["method"]) == ("a1", "ta", "fast")
    assert first["tau"] == 2.0 and first["speedup"] == pytest.approx((4 / 2) / (4 / 4))
    assert second["tau"] == 2.0 and second["speedup"] == pytest.approx((6 / 3) / (6 / 12))


def test_turns_of_a_question_are_one_point():
    turns = [record(m, "a1", tokens=5, seconds=s, turn=t, accepted=a)
             for t in (0, 1) for m, s, a in (("none", 5.0, None), ("fast", 3.0, [1, 1]))]  # fmt: skip
    assert [(p["tau"], p["speedup"]) for p in points(turns, ["none", "fast"])] == [(2.0, pytest.approx(2.0))]


def test_answers_without_a_step_are_no_point():
    assert points([record(m, "a1", tokens=1, seconds=1.0) for m in ("none", "fast")], ["none", "fast"]) == []


def test_bins():
    assert [bin_of(tau) for tau in (1.0, 1.24, 1.25, 1.99, 2.0, 3.0, 17.0)] == [0, 0, 1, 2, 3, 4, 4]
    found = [{"method": "fast", "tau": tau, "speedup": s} for tau, s in ((1.1, 1.0), (1.2, 1.2), (5.0, 3.0))]
    assert by_tau(found) == {"fast": [(2, pytest.approx(1.1)), (0, None), (0, None), (0, None), (1, 3.0)]}
