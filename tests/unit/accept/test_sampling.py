from __future__ import annotations

import math

import pytest

from amphista.accept.sampling import Sampling
from amphista.errors import RequestError


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -2},
        {"min_tokens": -1},
        {"presence_penalty": math.inf},
        {"frequency_penalty": math.nan},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {1.7: 1}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {1: math.inf}},
        {"logit_bias": 3},
        {"suppress_tokens": [1.5]},
        {"suppress_tokens": [-1]},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_settings_at_the_edge_are_taken():
    Sampling(temperature=0.0, top_p=1.0, min_p=1.0, seed=2**64 - 1)
    assert Sampling().is_greedy and not Sampling(temperature=1e-9).is_greedy
