"""Log-probabilities are those of the target's raw logits at the tokens it chose, whatever was drafted and how."""

from __future__ import annotations

import pytest
import torch

from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.target.target import Target
from amphista.tree.grow import parse_tree
from tests.decoding import decode
from tests.laws.test_fast_path import shaken_model
from tests.laws.test_native import NEEDS_COMPILER
from tests.tiny import HOSTILE

PROMPT = [5, 17, 230, 44, 9]
PARAMS = SamplingParams(
    max_new_tokens=20, temperature=0.9, seed=3, presence_penalty=3.0, logit_bias={9: 5}, top_logprobs=3
)


@pytest.mark.parametrize("tree", ["1", "chain", "24"])
@pytest.mark.parametrize("name", ["always-right", "always-wrong", "ends-early", "misled"])
def test_they_are_the_models_own(target, name, tree):
    tokens = decode(Engine(target, HOSTILE["random"]([]), parse_tree(1)), PROMPT, PARAMS).output_ids
    sequence = decode(Engine(target, HOSTILE[name](PROMPT + tokens), parse_tree(tree)), PROMPT, PARAMS)
    assert sequence.output_ids == tokens == [one.token_id for one in sequence.logprobs]
    assert (name, tree) != ("always-right", "chain") or max(sequence.stats.accepted) > 2
    with torch.no_grad():
        logits = target.model(input_ids=torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    for row, told in zip(expected, sequence.logprobs, strict=True):
        best = row.topk(3)
        assert told.logprob == pytest.approx(float(row[told.token_id]), abs=1e-3)
        assert list(told.top) == best.indices.tolist()
        assert list(told.top.values()) == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("is_preempted", [False, True])
@pytest.mark.parametrize("chunk_len", [1, 3, 64, 512])
def test_those_of_a_prompt_are_the_models_own(target, chunk_len, is_preempted):
    """However it is read, beside another that decodes, and read again where its rows had to go."""
    prompt = [(7 * n) % 250 for n in range(150)]
    engine = Engine(target, HOSTILE["random"]([]), parse_tree(4))
    other = engine.new_sequence(PROMPT, SamplingParams(max_new_tokens=200))
    sequence = engine.new_sequence(prompt, SamplingParams(max_new_tokens=3, top_logprobs=2, ignore_eos=True))
    sequence.prompt_logprobs, sequence.chunk_len, num_steps = [], chunk_len, 0
    while not sequence.is_finished:
        engine.step([other, sequence])
        num_steps += 1
        if is_preempted and num_steps in (2, 4):
            sequence.release()
    with torch.no_grad():
        logits = target.model(input_ids=torch.tensor([prompt])).logits[0, :-1]
    expected = torch.log_softmax(logits, -1)
    assert [one.token_id for one in sequence.prompt_logprobs] == prompt[1:]
    for row, told in zip(expected, sequence.prompt_logprobs, strict=True):
        assert told.logprob == pytest.approx(float(row[told.token_id]), abs=1e-3)
        assert list(told.top.values()) == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)
    assert sequence.output_ids == decode(engine, prompt, sequence.params).output_ids, "asking changes the answer"


@NEEDS_COMPILER
@pytest.mark.parametrize("asked", [{"logprobs": True}, {"top_logprobs": 2}, {}])
def test_the_c_step_has_logits_where_they_are_told(asked):
    """Greedily, where of others' logits nothing is read but which is the largest: alone, and beside one of those."""
    target, params = Target(shaken_model("llama")), SamplingParams(max_new_tokens=8, ignore_eos=True, **asked)
    expected = decode(Engine(target, HOSTILE["random"]([]), parse_tree(1)), PROMPT, params)
    assert target.speed_up(native=True) and target.is_native
    engine = Engine(target, HOSTILE["always-right"](PROMPT + expected.output_ids), parse_tree("chain"))
    for others in ([], [engine.new_sequence(PROMPT, SamplingParams(max_new_tokens=40))]):
        sequence = engine.new_sequence(PROMPT, params)
        sequence.prompt_logprobs = None if asked else []  # the answer's or the prompt's
        while not sequence.is_finished:
            assert not [result for result in engine.step([*others, sequence]) if isinstance(result, Exception)]
        assert sequence.output_ids == expected.output_ids
        assert asked or [one.token_id for one in sequence.prompt_logprobs] == PROMPT[1:]
        found, told = ([one.logprob for one in answer.logprobs] for answer in (sequence, expected))
        assert found == pytest.approx(told, abs=1e-3) and len(told) == (8 if asked else 0)


def test_they_cost_nothing_when_off(target, monkeypatch):
    monkeypatch.setattr("amphista.engine.step.token_logprobs", None)
    assert decode(Engine(target, HOSTILE["random"]([]), parse_tree(7)), PROMPT, SamplingParams()).logprobs == []
