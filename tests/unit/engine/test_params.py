from __future__ import annotations

import pytest

from amphista.engine.params import FinishReason, SamplingParams
from amphista.errors import RequestError


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -5}, "max_new_tokens is -5"),
        ({"stop": "END"}, "expected a tuple of strings"),
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
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "loop"]


@pytest.mark.parametrize("wrong", [{"temperature": "x"}, {"top_k": 1.5}, {"seed": True}, {"top_p": None}])
def test_values_of_another_type_are_refused_by_name(wrong):
    with pytest.raises(RequestError, match=f"{next(iter(wrong))} is .*expected a( whole)? number"):
        SamplingParams(**wrong)
