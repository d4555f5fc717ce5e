from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from amphista.engine.params import FinishReason, SamplingParams
from amphista.errors import RequestError


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -5}, "max_new_tokens is -5"),
        ({"stop": 3}, "expected a text or a list of texts"),
        ({"stop": ["a", 3]}, "expected a text or a list of texts"),
        ({"stop": "\ud83d"}, "half a character"),
        ({"max_tokens": 0}, "max_new_tokens is 0"),
        ({"stop_token_ids": "x"}, "expected a list of token ids"),
        ({"stop_token_ids": [-1]}, "expected a list of token ids"),
        ({"logprobs": "yes"}, "logprobs is 'yes'"),
        ({"top_logprobs": -1}, "top_logprobs is -1"),
        ({"stop": ("a", "")}, "empty stop string"),
        ({"temperature": -1.0}, "temperature is -1.0"),  # the checks of the base class run too
        ({"seed": -1}, "seed is -1"),
        ({"ignore_eos": 1}, "ignore_eos is 1: expected true or false"),
    ],
)
def test_bad_values_are_refused_by_name(wrong, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**wrong)


def test_defaults_are_greedy():
    params = SamplingParams()
    assert params.is_greedy and params.stop == () and params.repetition_penalty == 1


def test_finish_reasons_print_as_words():
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "loop", "abort", "error"]


@pytest.mark.parametrize("wrong", [{"temperature": "x"}, {"top_k": 1.5}, {"seed": True}, {"top_p": None}])
def test_values_of_another_type_are_refused_by_name(wrong):
    with pytest.raises(RequestError, match=f"{next(iter(wrong))} is .*expected a( whole)? number"):
        SamplingParams(**wrong)


def test_the_spellings_of_others_are_taken():
    params = SamplingParams(
        max_tokens=7, stop="END", stop_token_ids=5, top_k=-1, logit_bias={"3": -1}, suppress_tokens=[4], logprobs=2
    )
    assert (params.max_new_tokens, params.stop, params.stop_token_ids) == (7, ("END",), (5,))
    assert (params.logit_bias, params.suppress_tokens) == ({3: -1.0}, (4,))
    assert params.logprobs is True and params.top_logprobs == 2
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b") and SamplingParams(stop=None).stop == ()
    assert replace(params, max_new_tokens=9).max_new_tokens == 9 and replace(params, max_tokens=8).max_new_tokens == 8
    assert SamplingParams(logprobs=0).logprobs and not SamplingParams(logprobs=False).logprobs


def test_a_seed_is_fresh_unless_one_is_given():
    assert SamplingParams().seed is None and SamplingParams(seed=0).with_seed().seed == 0
    assert len({SamplingParams().with_seed().seed for _ in range(20)}) == 20


@pytest.mark.parametrize("wrong", [{"logit_bias": {300: 1}}, {"suppress_tokens": [2, 300]}, {"stop_token_ids": [300]}])
def test_token_ids_the_target_does_not_have_are_refused(wrong):
    with pytest.raises(RequestError, match=f"{next(iter(wrong))} names token id 300"):
        SamplingParams(**wrong).check_ids(300)


def test_numbers_of_numpy_and_torch_are_numbers():
    given = SamplingParams(
        temperature=np.float32(0.5),
        top_k=torch.tensor(3),
        max_tokens=np.int64(4),
        seed=np.int64(7),
        logprobs=np.int64(2),
        stop_token_ids=np.array([5, 6]),
        suppress_tokens=[np.int64(7)],
        logit_bias={np.int64(3): np.float64(1.0)},
    )
    assert given == SamplingParams(
        temperature=0.5,
        top_k=3,
        max_tokens=4,
        seed=7,
        logprobs=2,
        stop_token_ids=(5, 6),
        suppress_tokens=(7,),
        logit_bias={3: 1.0},
    )
    assert json.dumps(asdict(given))


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SamplingParams)])
def test_numbers_beyond_all_bounds_are_refused_or_taken(name, digits):
    """They are too large for a float, and the larger ones too long for Python to write down."""
    for number in (10**digits, -(10**digits)):
        for value in (number, [number], {5: number}, {number: 1.0}):
            with contextlib.suppress(RequestError):
                SamplingParams(**{name: value}).check_ids(300)
