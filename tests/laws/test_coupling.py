"""Drafts look at the noise of sampled answers, each sequence's own at the right positions, and change no answer."""

from __future__ import annotations

import pytest

from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.tree.grow import parse_tree
from tests.decoding import begin
from tests.tiny import VOCAB, Scripted, tiny_target

DEPTH, PROMPTS = 4, ([5, 6, 7], [9, 8, 7, 6, 5, 4], [3])


def answers(target, drafter, tree, temperature, **settings):
    """All in one batch, each with a seed of its own; begun one after the other, so that their positions differ."""
    engine = Engine(target, drafter, parse_tree(tree))
    params = [SamplingParams(max_new_tokens=25, temperature=temperature, seed=i, **settings) for i in range(3)]
    batch = [begin(engine, prompt, own) for prompt, own in zip(PROMPTS, params, strict=True)]
    while going := [sequence for sequence in batch if not sequence.is_finished]:
        engine.step(going)
    return batch


@pytest.mark.parametrize("tree", ["chain", "9", "40"])
def test_who_knows_nothing_is_right_where_noise_decides(tree):
    """At a temperature of 10^6 logits are nothing beside the noise, so a drafter for which all tokens are the same is
    always right; without the noise of its position it would be once in 300 times."""
    knows_nothing = Scripted(DEPTH, lambda *_: list(range(VOCAB)), fall=0.0)
    target = tiny_target()
    plain = [sequence.output_ids for sequence in answers(target, None, tree, 1e6, ignore_eos=True)]
    found = answers(target, knows_nothing, tree, 1e6, ignore_eos=True)
    assert [sequence.output_ids for sequence in found] == plain
    for sequence in found:
        assert set(sequence.stats.accepted[:-1]) == {DEPTH}
