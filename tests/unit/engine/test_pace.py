from __future__ import annotations

import pytest

from amphista.engine.pace import PacedEngine
from tests.scheduled import FakeSequence


class Timed:
    """A forward of 0.02 s and 0.001 s for each token of a prompt, by a clock of its own."""

    now = 100.0

    def step(self, batch):
        num_read = sum(min(sequence.chunk_len, sequence.num_unread) for sequence in batch)
        self.now += 0.02 + 0.001 * num_read
        return [sequence.step(1) for sequence in batch]


def test_it_learns_what_an_iteration_takes():
    engine = Timed()
    paced = PacedEngine(engine, clock=lambda: engine.now)
    assert paced.iteration_seconds(512, 4) == 0  # nothing is known: whoever is first is read at once
    for _ in range(60):
        sequence = FakeSequence([1] * 100, 9, ignore_eos=True)
        sequence.chunk_len = 50
        for _ in range(4):
            assert paced.step([sequence])
    assert paced.iteration_seconds(100, 3) == pytest.approx(0.02 + 0.1 + 0.02, rel=0.02)
    assert paced.iteration_seconds(100, 0) == pytest.approx(0.02 + 0.1, rel=0.02)
    assert paced.stepped_at == engine.now
