"""Products are those of torch, or of 8 bits the whole-number sums they claim to be; rows do not mix, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amphista.errors import NativeError
from amphista.kernels.linear import TorchLinear
from amphista.native.weights import LEVELS, Weight
from amphista.target.products import PlainLinear, RoundedLinear

ROWS = [1, 2, 7, 16, 33]


@pytest.fixture(params=["blocks", "outputs"])
def scheme(request, monkeypatch):
    """Weights of 8 bits share scales in blocks where the processor is quick at these; elsewhere each output's do."""
    if request.param == "outputs":
        monkeypatch.setattr(Weight, "packed_size", lambda weight, flags=None: 0)
    elif not RoundedLinear(torch.ones(1, 32)).native.is_packed:
        pytest.skip("whole numbers are not quicker on this processor")
    return request.param


def by_hand(weight, rows):
    """The same rounding, then whole numbers without any kernel."""
    scales, steps = weight.abs().amax(1) / LEVELS, rows.abs().amax(1, keepdim=True) / LEVELS
    numbers = (rows / steps + 0.5).floor().long() @ (weight / scales[:, None]).round().long().t()
    return numbers * scales * steps


@pytest.mark.parametrize("product", [TorchLinear, PlainLinear])
@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False, True)])
@torch.inference_mode()
def test_layers_side_by_side(product, biases):
    layers = [nn.Linear(24, outputs, bias=bias) for outputs, bias in zip((8, 4, 12), biases, strict=True)]
    x, residual = torch.randn(5, 24), torch.randn(5, 24)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    made = product.of(*layers)
    torch.testing.assert_close(made(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.added(x, residual), residual + expected, atol=1e-5, rtol=1e-5)
    assert made.num_bytes == 4 * 24 * 24 + (4 * 24 if any(biases) else 0)


@torch.inference_mode()
def test_what_is_held_and_what_is_copied():
    weight, x = torch.randn(40, 24), torch.randn(3, 24)
    expected = x @ weight.T
    held, copied, rounded = TorchLinear(weight), PlainLinear(weight), RoundedLinear(weight)
    weight.zero_()
    assert not held(x).any() and not held.is_copy
    torch.testing.assert_close(copied(x), expected, atol=1e-5, rtol=1e-5)
    assert (rounded(x) - expected).abs().max() < 0.03 * expected.abs().max() and rounded.is_copy


@torch.inference_mode()
@pytest.mark.parametrize("inputs", [24, 61])
@pytest.mark.parametrize("count", ROWS)
def test_8_bits_are_sums_of_whole_numbers(count, inputs):
    weight, rows = torch.randn(40, inputs), torch.randn(count, inputs)
    found, expected = RoundedLinear(weight)(rows), by_hand(weight, rows)
    # A value halfway between two numbers may go either way: few do, and by one step.
    assert ((found - expected).abs() < 1e-4).float().mean() > 0.9
    assert (found - rows @ weight.t()).abs().max() < 0.03 * (rows @ weight.t()).abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
def test_8_bits_with_bias_and_two_of_one_input(bias):
    layer = nn.Linear(24, 40, bias=bias)
    product, rows = RoundedLinear.of(layer), torch.randn(5, 24)
    plain = RoundedLinear(layer.weight)(rows)
    torch.testing.assert_close(product(rows), plain + (layer.bias if bias else 0), atol=1e-6, rtol=1e-6)
    both = RoundedLinear.of(layer, layer)
    assert torch.equal(both(rows), torch.cat([product(rows)] * 2, dim=1)) and len(both.halves()) == 2


@torch.inference_mode()
def test_blocks_of_8_bits_err_a_fraction_of_what_one_scale_an_output_does(scheme):
    """Where some inputs are much larger than others, as hidden states are."""
    weight, rows = torch.randn(64, 512), torch.randn(33, 512)
    rows[:, 7], weight[:, 7], weight[:, 300] = rows[:, 7] * 50, weight[:, 7] / 50, weight[:, 300] * 20
    expected = rows.double() @ weight.double().t()
    error = (RoundedLinear(weight)(rows) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0.015 < error < 0.05 if scheme == "blocks" else 0.05 < error < 0.2  # below it rows would have more bits


def test_a_number_of_a_block_of_8_bits_is_off_by_half_a_step_of_its_own_block():
    weight = torch.randn(5, 96) * torch.tensor([1.0, 30.0, 0.01]).repeat_interleave(32)
    most = weight.abs().unflatten(1, (-1, 32)).amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    found = Weight.in_8_bit_blocks(weight).rows(torch.arange(5))
    assert ((found - weight).abs() <= most / LEVELS * (0.5 + 2**-4)).all()  # the scale itself has 11 bits


def test_what_blocks_of_8_bits_cannot_hold():
    with pytest.raises(NativeError, match="blocks of 32 do not divide 40 inputs"):
        Weight.in_8_bit_blocks(torch.ones(3, 40))
    with pytest.raises(NativeError, match="larger than the scales"):
        Weight.in_8_bit_blocks(torch.full((3, 64), 1e7))
    assert torch.isfinite(RoundedLinear(torch.full((3, 64), 1e7))(torch.ones(2, 64))).all()
    tiny = torch.full((3, 64), 1e-30)
    tiny[1, 40] = 1.0
    assert torch.equal(Weight.in_8_bit_blocks(tiny).rows(torch.arange(3)).nonzero(), torch.tensor([[1, 40]]))


@torch.inference_mode()
def test_of_8_bits_a_row_is_the_same_alone_and_among_others(scheme):
    product, rows = RoundedLinear(torch.randn(48, 64)), torch.randn(300, 64)
    whole = product(rows)
    for count in ROWS:
        assert torch.equal(product(rows[:count]), whole[:count]), f"{count} rows"
    spoilt = 1e6 * torch.randn(16, 64)
    spoilt[3] = rows[3]
    assert torch.equal(product(spoilt)[3], whole[3])


@torch.inference_mode()
def test_of_8_bits_nothing_saturates_and_nothing_divides_by_zero(scheme):
    product = RoundedLinear(torch.ones(8, 576))
    rows = torch.stack([torch.ones(576), -torch.ones(576), torch.zeros(576)])
    expected = torch.tensor([576.0, -576.0, 0.0])[:, None].expand(3, 8)
    torch.testing.assert_close(product(rows), expected, rtol=5e-4 if scheme == "blocks" else 1e-5, atol=0)
    assert not RoundedLinear(torch.zeros(8, 576))(rows).any()
