"""Who takes the fast path: exactly the family's own modules; anything unknown keeps the stock model, and says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amphista.errors import TargetError
from amphista.target import qualify
from amphista.target.loading import load_target
from amphista.target.qualify import why_not_fast
from amphista.target.target import Target
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    reason = why_not_fast(tiny_model(family))
    if family in ("gemma2", "gpt_neox", "gpt2", "opt"):
        assert "not of the families that the fast forward knows" in reason
    else:
        assert reason is None


def _adapter(model):
    model.model.layers[1].mlp.down_proj = nn.Sequential(model.model.layers[1].mlp.down_proj)


def _subclass(model):
    class Scaled(nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj.__class__ = Scaled


def _hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def _patched(model):
    model.model.layers[0].forward = lambda *_: None


def _extra_part(model):
    model.model.layers[0].gate = nn.Linear(2, 2)


def _half(model):
    model.model.layers[0].half()


def _act(model):
    model.config.hidden_act = "gelu"


def _rope(model):
    model.config.rope_parameters = {"rope_type": "proportional", "factor": 2.0, "rope_theta": 10000.0}


def _parametrised(model):
    torch.nn.utils.parametrizations.orthogonal(model.model.layers[0].self_attn.o_proj)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_adapter, "not a plain linear layer"),
        (_subclass, "not a plain linear layer"),
        (_hook, "carries a hook"),
        (_patched, "patched forward"),
        (_extra_part, "parts that are not the family's"),
        (_half, "several types"),
        (_act, "activation is gelu"),
        (_rope, "of type proportional"),
        (_parametrised, "parametri"),
    ],
)
def test_what_is_unknown_stays_stock(change, said):
    model = tiny_model()
    change(model)
    assert said in why_not_fast(model)


def test_a_subclass_of_the_family_stays_stock():
    model = tiny_model()
    model.__class__ = type("MyLlama", (type(model),), {})
    assert "MyLlama is not of the families" in why_not_fast(model)


def test_float16_stays_stock():
    target = Target(tiny_model(dtype=torch.float16))
    assert not target.speed_up() and target.path == "stock" and "float16" in target.why_stock
    assert target.stock() is target


def test_float64_is_fast():
    target = Target(tiny_model(dtype=torch.float64))
    assert target.speed_up() and target.path == "fast"


def test_a_loaded_target_is_fast_and_gives_its_stock_model_up(target_folder):
    fast, stock = load_target(str(target_folder)), load_target(str(target_folder), fast=False)
    assert fast.path in ("native", "fast") and stock.path == "stock" and fast.fingerprint == stock.fingerprint
    with pytest.raises(TargetError, match="load it with fast=False"):
        _ = fast.model
    assert fast.stock().path == "stock" and fast.stock() is fast.stock()
    ids = torch.arange(5)[None]
    torch.testing.assert_close(fast.hidden_states(ids), fast.stock().hidden_states(ids), atol=1e-4, rtol=1e-4)
    held = Target(tiny_model())
    assert held.speed_up(release=True)
    with pytest.raises(TargetError, match="cannot be loaded again"):
        held.stock()


def test_half_precision_is_for_gpus():
    assert qualify._type_reason(torch.float16, "cuda") is None
    assert qualify._type_reason(torch.float16, "cpu") == "its weights are float16"
    assert qualify._type_reason(torch.bfloat16, "cpu") is None
    assert qualify._type_reason(torch.float32, "mps") == "the fast path has not been tried on mps devices"
