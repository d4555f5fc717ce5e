"""Packed products equal plain ones for any number of rows, alone or side by side, and rows do not mix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amphista.kernels import linear
from amphista.kernels.frozen import pack_linears
from amphista.kernels.linear import PackedLinear

ROWS = [1, 2, 7, 16, 33, 300]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_products_equal_plain_ones(bias, packed):
    layer = nn.Linear(24, 40, bias=bias)
    product = PackedLinear(layer.weight, layer.bias, pack=packed)
    assert product.is_packed == (packed and linear.can_pack(layer.weight))
    for rows in ROWS:
        x, residual = torch.randn(rows, 24), torch.randn(rows, 40)
        torch.testing.assert_close(product(x), layer(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(product.added(x, residual), residual + layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False, True)])
@torch.inference_mode()
def test_layers_side_by_side(biases):
    layers = [nn.Linear(24, outputs, bias=bias) for outputs, bias in zip((8, 4, 12), biases, strict=True)]
    x = torch.randn(5, 24)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(PackedLinear.of(*layers)(x), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_row_does_not_see_the_others():
    product = PackedLinear(torch.randn(48, 64))
    x = torch.randn(16, 64)
    spoilt = 1e6 * torch.randn(16, 64)
    spoilt[3] = x[3]
    assert torch.equal(product(x)[3], product(spoilt)[3])


@torch.inference_mode()
def test_once_packed_the_callers_own_may_change():
    weight, x = torch.randn(40, 24), torch.randn(3, 24)
    packed, plain = PackedLinear(weight), PackedLinear(weight, pack=False)
    assert packed.num_bytes == plain.num_bytes == 4 * 40 * 24
    expected = x @ weight.T
    weight.zero_()
    torch.testing.assert_close(packed(x), expected if packed.is_packed else torch.zeros(3, 40), atol=1e-5, rtol=1e-5)
    assert not plain(x).any(), "held as it is, not twice"


def test_other_types_stay_plain():
    product = PackedLinear(torch.randn(40, 24, dtype=torch.float64))
    assert not product.is_packed and product(torch.randn(2, 24, dtype=torch.float64)).dtype == torch.float64


def test_a_frozen_module_computes_the_same():
    module = nn.Sequential(nn.Linear(24, 16), nn.Sequential(nn.SiLU(), nn.Linear(16, 8, bias=False)))
    x, can_pack = torch.randn(2, 3, 24), linear.can_pack(module[0].weight)
    expected = module(x)
    pack_linears(module)
    assert not list(module.parameters()) or not can_pack
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
