from __future__ import annotations

import math

import pytest

from amphista.engine.pace import PacedEngine
from tests.scheduled import FakeSequence


class Timed:
    """A forward of 0.02 s, 0.001 s for each token of a prompt, 0.01 for each that decodes, by a clock of its own."""

    now = 100.0

    def step(self, batch):
        num_read = sum(min(sequence.chunk_len, sequence.num_unread) for sequence in batch)
        self.now += 0.02 + 0.001 * num_read + 0.01 * sum(not sequence.num_unread for sequence in batch)
        return [sequence.step(1) for sequence in batch]


def test_it_learns_what_may_be_read():
    engine = Timed()
    paced = PacedEngine(engine, clock=lambda: engine.now)
    assert paced.num_readable(0.1, 4) == math.inf  # nothing is known: whoever is first is read at once
    decoding = [FakeSequence([1], 10_000, ignore_eos=True) for _ in range(4)]
    for sequence in decoding:
        sequence.chunk_len = 1
    paced.step(decoding)  # their prompts
    for _ in range(30):
        for num_decoding in (4, 2):
            sequence = FakeSequence([1] * 100, 9, ignore_eos=True)
            sequence.chunk_len = 50
            paced.step([sequence, *decoding[:num_decoding]])
            paced.step(decoding[:num_decoding])
    assert paced.num_readable(0.1, 4) == pytest.approx(100, rel=0.02)
    assert paced.num_readable(0.01, 4) == pytest.approx(60, rel=0.02)  # as long as a step
    assert paced.num_readable(0.01, 1) == pytest.approx(40, rel=0.02)  # of the nearest number known
    assert paced.stepped_at == engine.now


def test_what_was_read_counts_not_what_might_have_been():
    """A prompt whose own log-probabilities are told is read in smaller pieces than a chunk."""

    class Careful(Timed):
        def step(self, batch):
            chunk_lens = [sequence.chunk_len for sequence in batch]
            for sequence in batch:
                sequence.chunk_len = min(10, sequence.chunk_len)
            results = super().step(batch)
            for sequence, chunk_len in zip(batch, chunk_lens, strict=True):
                sequence.chunk_len = chunk_len
            return results

    engine = Careful()
    paced = PacedEngine(engine, clock=lambda: engine.now)
    sequence = FakeSequence([1] * 400, 9, ignore_eos=True)
    sequence.chunk_len = 100
    for _ in range(30):
        paced.step([sequence])
    assert paced.num_readable(0.3, 0) == pytest.approx(100, rel=0.02)  # 0.003 s a token, the forward included
