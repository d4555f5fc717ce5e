"""8-bit products are the whole-number sums they claim to be, near the float ones; rows do not mix, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amphista.kernels.int8 import LEVELS, ZERO, Int8Linear, can_quantise

pytestmark = pytest.mark.skipif(not can_quantise(torch.empty(0)), reason="this CPU has no 8-bit dot products")
ROWS = [1, 2, 7, 16, 33, 300]


def by_hand(weight, rows):
    """The same rounding, then whole numbers without any kernel."""
    scales, steps = weight.abs().amax(1) / LEVELS, rows.abs().amax(1, keepdim=True) / LEVELS
    numbers = (rows / steps + 0.5).floor().long() @ (weight / scales[:, None]).round().long().t()
    return numbers * scales * steps


@torch.inference_mode()
@pytest.mark.parametrize("count", ROWS)
def test_products_are_sums_of_whole_numbers(count):
    weight, rows = torch.randn(40, 24), torch.randn(count, 24)
    found, expected = Int8Linear(weight)(rows), by_hand(weight, rows)
    # A value halfway between two numbers may go either way: few do, and by one step.
    assert ((found - expected).abs() < 1e-5).float().mean() > 0.95
    assert (found - rows @ weight.t()).abs().max() < 0.03 * (rows @ weight.t()).abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
def test_bias_and_residual(bias):
    layer = nn.Linear(24, 40, bias=bias)
    product = Int8Linear.of(layer)
    rows, residual = torch.randn(5, 24), torch.randn(5, 40)
    plain = Int8Linear(layer.weight)(rows)
    torch.testing.assert_close(product(rows), plain + (layer.bias if bias else 0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(product.added(rows, residual), residual + product(rows), atol=1e-6, rtol=1e-6)
    both = Int8Linear.of(layer, layer)
    assert torch.equal(both(rows), torch.cat([product(rows)] * 2, dim=1))
    assert product.num_bytes == 40 * 24 + 4 * 40 * (2 if bias else 1)


@torch.inference_mode()
def test_a_row_is_the_same_alone_and_among_others():
    product = Int8Linear(torch.randn(48, 64))
    rows = torch.randn(300, 64)
    whole = product(rows)
    for count in ROWS:
        assert torch.equal(product(rows[:count]), whole[:count]), f"{count} rows"
    spoilt = 1e6 * torch.randn(16, 64)
    spoilt[3] = rows[3]
    assert torch.equal(product(spoilt)[3], whole[3])


@torch.inference_mode()
def test_nothing_saturates_and_nothing_divides_by_zero():
    product = Int8Linear(torch.ones(8, 576))
    rows = torch.stack([torch.ones(576), -torch.ones(576), torch.zeros(576)])
    expected = torch.tensor([576.0, -576.0, 0.0])[:, None].expand(3, 8)
    torch.testing.assert_close(product(rows), expected, rtol=1e-5, atol=0)
    numbers, _ = product.quantise(rows)
    assert numbers[:, 0].tolist() == [ZERO + LEVELS, ZERO - LEVELS, ZERO]
    assert not Int8Linear(torch.zeros(8, 576))(rows).any()
