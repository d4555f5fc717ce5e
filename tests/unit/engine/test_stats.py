from __future__ import annotations

import pytest
import torch

from amphista.engine.stats import PHASES, Clock, DecodeStats


def test_nothing_is_made_up_without_a_step():
    stats = DecodeStats(num_tokens=1)
    assert stats.num_steps == 0 and stats.tau is None
    assert stats.tokens_per_second is None and stats.decode_tokens_per_second is None


def test_the_token_of_the_prefill_is_not_counted_in_tau():
    stats = DecodeStats(num_tokens=1 + 3 + 1 + 4, accepted=[2, 0, 3], prefill_seconds=1.0, step_seconds=[0.5, 0.5, 1.0])
    assert stats.tau == pytest.approx(8 / 3) == pytest.approx(sum(stats.accepted) / 3 + 1)
    assert stats.seconds == 3.0
    assert stats.tokens_per_second == 3.0 and stats.decode_tokens_per_second == 4.0


def test_plain_decoding_has_tau_1():
    assert DecodeStats(num_tokens=5, accepted=[0, 0, 0, 0]).tau == 1.0


def test_clock_adds_phases_up(monkeypatch):
    ticks = iter([10.0, 11.5, 20.0, 20.25])
    monkeypatch.setattr("amphista.engine.stats.time.perf_counter", lambda: next(ticks))
    both = [DecodeStats(), DecodeStats()]
    clock = Clock(both, torch.device("cpu"))
    for _ in range(2):
        with clock.phase("draft"):
            pass
    for stats in both:
        assert stats.phase_seconds == {**dict.fromkeys(PHASES, 0.0), "draft": 1.75}


def test_two_answers_share_no_counter():
    assert DecodeStats().accepted is not DecodeStats().accepted
    assert DecodeStats().phase_seconds is not DecodeStats().phase_seconds
