"""Drafts look at the noise of sampled answers, each sequence's own at the right positions, and change no answer."""

from __future__ import annotations

import pytest

from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.tree.grow import parse_tree
from tests.decoding import begin
from tests.tiny import VOCAB, Scripted, tiny_target

DEPTH, PROMPTS = 4, ([5, 6, 7], [9, 8, 7, 6, 5, 4], [3])


def answers(target, drafter, tree, prompts=PROMPTS):
    """At a temperature at which logits are nothing beside the noise, all in one batch, each with a seed of its own, at
    positions of its own."""
    engine = Engine(target, drafter, parse_tree(tree))
    params = [SamplingParams(max_new_tokens=25, temperature=1e6, seed=i, ignore_eos=True) for i in range(3)]
    batch = [begin(engine, prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    while going := [sequence for sequence in batch if not sequence.is_finished]:
        engine.step(going)
    return batch


def knows_nothing():
    """For which all tokens are the same."""
    return Scripted(DEPTH, lambda *_: list(range(VOCAB)), fall=0.0)


@pytest.mark.parametrize("tree", ["chain", "9", "40"])
def test_who_knows_nothing_is_right_where_noise_decides(tree):
    """Always; without the noise of its position it would be once in 300 times."""
    target = tiny_target()
    plain, found = (answers(target, drafter, tree) for drafter in (None, knows_nothing()))
    assert [sequence.output_ids for sequence in found] == [sequence.output_ids for sequence in plain]
    for sequence in found:
        assert set(sequence.stats.accepted[:-1]) == {DEPTH}


def test_what_followed_before_does_not_follow_where_noise_decides():
    """A text that has said nothing but 5 6 7 is no reason to guess so again."""
    target, texts = tiny_target(), [[5, 6, 7] * (9 + i) for i in range(3)]
    plain = answers(target, None, "5", texts)
    found = answers(target, Proposer(knows_nothing(), use_lookup=True), "5", texts)
    assert [sequence.output_ids for sequence in found] == [sequence.output_ids for sequence in plain]
    for sequence in found:
        assert set(sequence.stats.accepted[:-1]) == {DEPTH}
