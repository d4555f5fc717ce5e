"""benchmarks/lab/step_profile.py: calls into torch are operations, what lies between them is not."""

from __future__ import annotations

import time

import pytest
import torch

from amphista.drafter.proposer import Proposer
from amphista.llm import LLM
from benchmarks.lab import step_profile
from benchmarks.lab.step_profile import OperationTimer, Timed, between_operations, profile_steps, timer_seconds


def test_calls_into_torch_are_counted_once_whatever_they_call():
    rows = torch.ones(3, 4)
    with OperationTimer() as timer:
        torch.nn.functional.linear(rows, rows).softmax(-1)
        sum(range(100))
    assert timer.calls == 2 and timer.seconds > 0
    rows.sum()
    assert timer.calls == 2


def test_packed_products_are_operations(target):
    cache = target.new_cache()
    target.prefill([1, 2, 3], cache)
    with OperationTimer() as timer:
        target.prefill([4], cache)
    assert timer.calls > 10 * target.spec.num_layers


def test_other_calls_can_be_watched_and_are_put_back():
    class Device:
        @staticmethod
        def wait(seconds):
            time.sleep(seconds)

    before, timer = Device.wait, OperationTimer()
    with timer.watching((Device, "wait")):
        Device.wait(0.002)
    assert timer.calls == 1 and timer.seconds >= 0.002 and Device.wait is before


def test_by_hand():
    steps = [
        (Timed(0.020, 0.015, 1000), Timed(0.016, 0.0145, 900)),
        (Timed(0.030, 0.027, 2000), Timed(0.020, 0.018, 1000)),
    ]
    found = between_operations(steps, per_call=1e-6)
    assert found["num_steps"] == 2 and found["calls"] == 1500
    assert found["operations_ms"] == pytest.approx(21)
    assert found["at_most_ms"] == pytest.approx(4)
    assert found["outside_ms"] == pytest.approx((4 + 1) / 2)
    assert found["forward_ms"] == pytest.approx((0.6 + 1) / 2)
    assert between_operations([], 1e-6)["num_steps"] == 0


@pytest.mark.parametrize("drafter", [Proposer(), Proposer(use_lookup=True)])
def test_decoding_is_timed_step_by_step(target, monkeypatch, drafter):
    monkeypatch.setattr(step_profile, "CALIBRATIONS", 3)
    llm = LLM(target, drafter, tree=4)
    forward = target.forward
    found = profile_steps(llm, "it", rounds=2, new_tokens=6)
    assert found["drafter"] == "it" and 0 < found["num_steps"] <= 5
    assert 0 <= found["outside_ms"] <= found["at_most_ms"] and found["forward_ms"] < found["at_most_ms"]
    assert found["calls"] > 10 and target.forward == forward


def test_the_timers_own_cost_is_small_but_there(monkeypatch):
    monkeypatch.setattr(step_profile, "CALIBRATIONS", 20)
    assert 0 < timer_seconds() < 1e-3
