from __future__ import annotations

import pytest
import torch

from amphista.accept.draw import gumbel_noise
from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.evaluation.lossless import Divergence, first_divergence
from amphista.tree.grow import parse_tree
from tests.decoding import decode

PROMPT = [5, 17, 230]


@pytest.fixture(scope="module")
def answer(target):
    params = SamplingParams(max_new_tokens=8)
    return decode(Engine(target, Proposer(), parse_tree(1)), PROMPT, params).output_ids


def logits_after(target, ids):
    return target.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].detach()


def test_identical(target, answer):
    assert first_divergence(target, PROMPT, SamplingParams(), answer, list(answer)) is None
    assert first_divergence(target, PROMPT, SamplingParams(), [], []) is None


@pytest.mark.parametrize("at", [0, 3, 7])
def test_position_and_greedy_margin(target, answer, at):
    other = [*answer[:at], (answer[at] + 1) % 300, *answer[at + 1 :]]
    best = logits_after(target, PROMPT + answer[:at]).topk(2).values
    found = first_divergence(target, PROMPT, SamplingParams(), answer, other)
    assert found == Divergence(at, pytest.approx(float(best[0] - best[1]), abs=1e-3))


def test_one_answer_longer_than_the_other(target, answer):
    assert first_divergence(target, PROMPT, SamplingParams(), answer, answer[:5]).position == 5
    assert first_divergence(target, PROMPT, SamplingParams(), answer[:5], answer).position == 5


def test_sampled_margin_is_that_of_the_noised_scores(target, answer):
    params = SamplingParams(temperature=0.7, seed=8)
    other = [*answer[:2], (answer[2] + 1) % 300]
    scores = logits_after(target, PROMPT + answer[:2]).double() / 0.7 + torch.from_numpy(gumbel_noise(8, 5, 300))
    best = scores.topk(2).values
    assert first_divergence(target, PROMPT, params, answer, other).margin == pytest.approx(
        float(best[0] - best[1]), abs=1e-3
    )


def test_penalties_look_at_prompt_and_output(target, answer):
    params = SamplingParams(repetition_penalty=0.1)  # below 1, so that a token of the output leads
    before = PROMPT + answer[:4]
    scores = logits_after(target, before)
    for token in set(before):
        scores[token] = scores[token] * 0.1 if scores[token] < 0 else scores[token] / 0.1
    best = scores.topk(2).values
    assert int(scores.argmax()) in answer[:4] and int(scores.argmax()) not in PROMPT
    found = first_divergence(target, PROMPT, params, answer, [*answer[:4], -1])
    assert found.margin == pytest.approx(float(best[0] - best[1]), abs=1e-3)
