"""Drafts look at the noise of sampled answers, each sequence's own at the right positions, and change no answer."""

from __future__ import annotations

import pytest

from amphista.accept.coupling import coupled_graft
from amphista.drafter.lookup import Lookup
from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.tree.grow import parse_tree
from tests.decoding import begin, decode
from tests.tiny import VOCAB, Scripted, tiny_target

DEPTH, PROMPTS = 4, ([5, 6, 7], [9, 8, 7, 6, 5, 4], [3])


def answers(target, drafter, tree, prompts=PROMPTS):
    """At a temperature at which logits are nothing beside the noise, all in one batch, each with a seed of its own, at
    positions of its own."""
    engine = Engine(target, drafter, parse_tree(tree))
    params = [SamplingParams(max_new_tokens=25, temperature=1e6, seed=i, ignore_eos=True) for i in range(3)]
    batch = [begin(engine, prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    while going := [sequence for sequence in batch if not sequence.is_finished]:
        assert not [error for error in engine.step(going) if isinstance(error, Exception)]
    return batch


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e308, 1e300, 200.0, 1e-5, 1e-300, 5e-324])
def test_any_temperature_is_drafted_for(temperature):
    """Numbers beyond all floats make no step fail."""
    found = []
    for drafter in (None, Proposer(knows_nothing(), use_lookup=True)):
        engine = Engine(tiny_target(), drafter, parse_tree("9"))
        params = SamplingParams(max_new_tokens=12, temperature=temperature, seed=1, ignore_eos=True)
        found.append(decode(engine, [5, 6, 7] * 9, params).output_ids)
    assert found[0] == found[1]


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


def test_n_gram_drafts_are_weighed_by_the_noise_of_their_positions():
    target, texts = tiny_target(), [[*range(100 + 3 * i)] for i in range(3)]  # each followed by another
    plain = answers(target, None, "5", texts)
    engine = Engine(target, Proposer(knows_nothing(), use_lookup=True), parse_tree("5"))
    checked = 0
    for seed in range(30):
        sequence = begin(engine, texts[1], SamplingParams(max_new_tokens=25, temperature=0.8, seed=seed))
        said, found = Lookup().propose(sequence.token_ids, DEPTH), engine._draft_row(sequence, seldom=False).graft
        if said is not None:
            expected = coupled_graft(said, sequence.chooser, len(sequence.token_ids))
            assert found.tokens == said.tokens and found.log_probs == expected.log_probs != said.log_probs
            checked += 1
    assert checked > 3
    beside = answers(target, Proposer(knows_nothing(), use_lookup=True), "5", texts)
    assert [sequence.output_ids for sequence in beside] == [sequence.output_ids for sequence in plain]
