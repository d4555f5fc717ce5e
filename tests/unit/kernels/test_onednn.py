"""What torch's private operators do is tried before it is trusted; without them the plain products take their place."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from amphista.errors import TargetError
from amphista.kernels import onednn
from amphista.kernels.int8 import Int8Linear, can_quantise
from amphista.kernels.linear import PackedLinear, can_pack
from amphista.target.target import Target
from tests.tiny import tiny_model


class Operators:
    """Stands for an operator with the overloads of another torch."""

    def __init__(self, act):
        self.default = self.binary = self._act = act

    def __call__(self, *args):
        return self._act(*args)


def refuse(*args):
    raise RuntimeError("unexpected argument")


REAL = onednn.operator
CHANGES = {
    "gone": lambda namespace, name: None,
    "refusing": lambda namespace, name: Operators(refuse),
    "meaning something else": lambda namespace, name: Operators(lambda *args: torch.zeros(3, 5)),
    "wrong by a little": lambda namespace, name: (
        Operators(
            lambda *args: (REAL(namespace, name).binary if len(args) == 5 else REAL(namespace, name))(*args) * 1.01
        )
        if "pointwise" in name
        else REAL(namespace, name)
    ),
}


@pytest.fixture(params=CHANGES)
def changed(request, monkeypatch):
    monkeypatch.setattr(onednn, "operator", CHANGES[request.param])
    caches = (onednn.packed_products, onednn.int8_products)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def test_without_them_the_plain_product_is_used(changed):
    weight, rows, residual = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3, 5)
    assert not can_pack(weight) and not can_pack(weight.bfloat16())
    product = PackedLinear(weight)
    assert not product.is_packed and torch.equal(product(rows), rows @ weight.T)
    assert torch.equal(product.added(rows, residual), residual + rows @ weight.T)


def test_without_them_a_target_decodes_all_the_same(changed):
    target, ids = Target(tiny_model()), torch.arange(3, 20)[None]
    expected = target.hidden_states(ids)
    assert target.speed_up() and not target._lean.head.is_packed
    torch.testing.assert_close(target.hidden_states(ids), expected, atol=1e-4, rtol=1e-4)


def test_without_them_weights_of_8_bits_are_refused(changed):
    assert not can_quantise(torch.empty(0))
    with pytest.raises(TargetError, match="no products of 8-bit numbers"):
        Int8Linear(torch.randn(5, 8))


def test_a_question_that_this_torch_does_not_know(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported")
    assert not onednn.supports("_is_vnni_supported") and not onednn.supports("_is_of_no_torch")


def test_importing_the_library_changes_no_environment():
    code = "import os; before = dict(os.environ); import amphista, amphista.kernels.linear; assert os.environ == before"
    subprocess.run([sys.executable, "-c", code], check=True)
