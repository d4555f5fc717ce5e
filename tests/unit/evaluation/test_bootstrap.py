"""evaluation/bootstrap.py: ratios of sums by hand; with two questions the extremes are each alone."""

from __future__ import annotations

import pytest

from amphista.evaluation.bootstrap import add_to, bootstrap


def test_a_ratio_of_sums_and_its_extremes():
    value, interval = bootstrap({"a": [2.0, 1.0], "b": [6.0, 3.0], "c": [1.0, 2.0]}, over=(0,), under=(1,))
    assert value == pytest.approx(9 / 6)
    value, interval = bootstrap({"a": [2.0, 1.0], "b": [1.0, 2.0]}, over=(0,), under=(1,))
    assert value == 1.0 and interval == pytest.approx((0.5, 2.0))


def test_several_columns_multiply():
    value, interval = bootstrap({"a": [2.0, 3.0, 4.0, 0.5]}, over=(0, 1), under=(2, 3))
    assert value == 3.0 and interval == (3.0, 3.0)


def test_nothing_is_divided_by_nothing():
    assert bootstrap({}, over=(0,), under=(1,)) == (None, None)
    assert bootstrap({"a": [1.0, 0.0]}, over=(0,), under=(1,)) == (None, None)
    value, interval = bootstrap({"a": [0.0, 2.0], "b": [0.0, 0.0]}, over=(0,), under=(1,))
    assert value == 0.0 and interval == (0.0, 0.0)  # resamples of b alone are left out


def test_answers_of_a_question_stay_together():
    sums = {}
    add_to(sums, "a", (1, 2))
    add_to(sums, "a", (3, 4.5))
    add_to(sums, "b", (1, 1))
    assert sums == {"a": [4.0, 6.5], "b": [1.0, 1.0]}
