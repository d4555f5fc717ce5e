"""Passes of training in C: losses over any vocabulary and norms are those of torch in float64 over the same numbers."""

from __future__ import annotations

import pytest
import torch

from amphista.drafter import frozen_head
from amphista.drafter.frozen_head import Aims, FrozenHead
from amphista.drafter.layers import RMSNorm
from amphista.kernels.parts import Gate, Norm
from amphista.native import training as native

SIZES = [1, 3, 16, 63, 64, 130, 1000]
WEIGHTS = [(1.0, 0.1), (0.5, 0.0), (0.0, 1.0)]


def drawn(size, rows=37, spread=4.0):
    generator = torch.Generator().manual_seed(size)
    logits = (torch.randn(rows, size, generator=generator) * spread).bfloat16()
    logits[::5, size // 2] = logits[::5].amax(-1)  # equals, the first or not
    probs = torch.softmax(torch.randn(rows + 3, size, generator=generator) * 3, -1)
    index = torch.randint(0, rows + 3, (rows,), generator=generator)
    labels = torch.randint(-1, size, (rows,), generator=generator)
    labels[::5], labels[1::5] = size // 2, logits[1::5].float().argmax(-1)
    labels[2], labels[3] = -1, size - 1
    return logits, Aims(probs, index, labels)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_losses_in_c_are_those_of_the_passes(size, weights):
    logits, aims = drawn(size)
    exact = Aims(aims.target_probs.double(), aims.rows, aims.labels)
    losses, right, gradient = frozen_head._by_passes(logits.double(), exact, weights, True)
    untouched = logits.clone()
    found, is_right = native.cross_entropies(untouched, *aims, weights, False)
    assert torch.equal(untouched, logits), "nobody asked for a gradient"
    torch.testing.assert_close(found.double(), losses, rtol=3e-6, atol=3e-6)
    assert torch.equal(is_right, right) and (size == 1 or 0 < int(right.sum()) < len(right))
    again, _ = native.cross_entropies(logits, *aims, weights, True)
    assert torch.equal(again, found)
    torch.testing.assert_close(logits.double(), gradient, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_a_softmax_in_c_is_a_softmax(size):
    logits, _ = drawn(size)
    out = torch.full(logits.shape, 7.0)
    native.softmax(logits, out)
    torch.testing.assert_close(out.double(), torch.softmax(logits.double(), -1), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(broken):
    logits, aims = drawn(64)
    logits[4, 5] = broken
    losses, _ = native.cross_entropies(logits, *aims, (1.0, 0.1), True)
    assert (~losses.isfinite()).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_in_bfloat16_has_the_loss_and_the_gradient_of_one_without_c(monkeypatch, bias):
    """More rows than one part has; the gradients differ by their rounding to bfloat16 alone."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(200, 48, generator=generator).bfloat16()
    states = torch.randn(1100, 48, generator=generator) / 3
    _, aims = drawn(200, rows=1100)
    found = []
    for reads in (native.reads, lambda logits: False):
        monkeypatch.setattr(native, "reads", reads)
        head = FrozenHead(weight, torch.linspace(-1, 1, 200).bfloat16() if bias else None)
        found.append([*head.cross_entropies(states, aims, (1.0, 0.1), True), head.probabilities(states.bfloat16())])
    (loss, right, gradient, probs), (plain, plain_right, plain_gradient, plain_probs) = found
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)
    assert torch.equal(right, plain_right) and gradient.dtype is states.dtype
    torch.testing.assert_close(gradient, plain_gradient, rtol=0.02, atol=0.02)
    torch.testing.assert_close(probs, plain_probs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 64), (300, 576)], ids=str)
def test_a_norm_in_c_is_the_norm_and_so_is_its_gradient(kind, shape):
    generator = torch.Generator().manual_seed(shape[-1])
    layer = RMSNorm(shape[-1], 1e-5)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape[-1], generator=generator))
    x = (torch.randn(shape, generator=generator) * 2).to(kind).requires_grad_(True)
    upstream = torch.randn(shape, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert native.norms(x, layer.weight)
        normed = layer(x)
    assert normed.dtype is torch.bfloat16 and normed.shape == x.shape
    normed.backward(upstream)
    exact, weight = x.detach().double().requires_grad_(True), layer.weight.detach().double().requires_grad_(True)
    wanted = torch.nn.functional.rms_norm(exact, (shape[-1],), weight, 1e-5)
    wanted.backward(upstream.double())
    torch.testing.assert_close(normed.double(), wanted, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-4)
    rtol = 2**-8 if kind is torch.bfloat16 else 1e-4
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=rtol, atol=1e-5)


def test_a_norm_is_in_c_only_where_products_are_in_bfloat16():
    layer, x = RMSNorm(64, 1e-5), torch.randn(3, 64)
    assert not native.norms(x, layer.weight) and layer(x).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert native.norms(x, layer.weight)
        assert not native.norms(x.double(), layer.weight) and not native.norms(x[:, :40], layer.weight)


@pytest.mark.parametrize("shape", [(1, 16), (37, 64), (300, 1536)], ids=str)
def test_a_targets_rows_are_normed_and_activated_in_c_as_in_float64(monkeypatch, shape):
    """Also a row alone; torch's passes round between two of them."""
    generator = torch.Generator().manual_seed(shape[-1])
    rows = (torch.randn(shape[0], 2 * shape[1], generator=generator) * 3).bfloat16()
    norm = Norm((torch.randn(2 * shape[1], generator=generator)).bfloat16(), 1e-5)
    gate, up = rows.double().chunk(2, -1)
    wanted = {
        Gate(): torch.nn.functional.silu(gate) * up,
        norm: torch.nn.functional.rms_norm(rows.double(), (rows.shape[1],), norm.weight.double(), 1e-5),
    }
    for compute, exact in wanted.items():
        assert native.passes(rows, rows.shape[1])
        found = compute(rows)
        assert found.dtype is torch.bfloat16 and torch.equal(compute(rows[-1:].clone())[0], found[-1])
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)
        with monkeypatch.context() as patch:
            patch.setattr(native, "passes", lambda *of: False)
            torch.testing.assert_close(compute(rows).double(), exact, rtol=2**-6, atol=1e-6)


def test_rows_that_need_a_gradient_or_are_of_another_kind_stay_with_torch():
    rows = torch.randn(4, 64).bfloat16()
    assert native.passes(rows, 32) and not native.passes(rows.float(), 32) and not native.passes(rows, 40)
    assert not native.passes(rows[:, :32], 16) and not native.passes(rows.clone().requires_grad_(), 32)
    kept = rows.clone().requires_grad_()
    Gate()(Norm(torch.ones(64).bfloat16(), 1e-5)(kept)).sum().backward()
    assert kept.grad is not None and kept.grad.abs().sum() > 0
