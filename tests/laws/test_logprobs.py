"""Log-probabilities are those of the target's raw logits at the tokens it chose, whatever was drafted and how."""

from __future__ import annotations

import pytest
import torch

from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.tree.grow import parse_tree
from tests.decoding import decode
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


def test_they_cost_nothing_when_off(target, monkeypatch):
    monkeypatch.setattr("amphista.engine.step.token_logprobs", None)
    assert decode(Engine(target, HOSTILE["random"]([]), parse_tree(7)), PROMPT, SamplingParams()).logprobs == []
