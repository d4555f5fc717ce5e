from __future__ import annotations

import math
import warnings

import pytest
import torch

from amphista.drafter.layers import (
    Attention,
    LayerCache,
    LayerSizes,
    ResidualBlock,
    RMSNorm,
    SwiGLU,
    TransformerLayer,
    mix,
    rotary_tables,
)

SIZES = LayerSizes(
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_size=6,
    intermediate_size=20,
    rope_theta=100.0,
    norm_eps=1e-5,
)


def shaken(module):
    """Random weights everywhere: what starts at zero would hide from a test."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4)
    return module.eval()


def test_blocks_start_as_the_identity():
    x = torch.randn(2, 3, 16)
    assert torch.equal(ResidualBlock(16)(x), x)
    assert torch.equal(TransformerLayer(SIZES)(x, is_causal=True), x)


def test_residual_block_by_hand():
    block = shaken(ResidualBlock(4))
    z = torch.randn(4)
    inner = block.linear.weight @ z + block.linear.bias
    torch.testing.assert_close(block(z), z + inner * torch.sigmoid(inner))


def test_swiglu_by_hand():
    block = shaken(SwiGLU(4, 6))
    x = torch.randn(4)
    gate = block.gate.weight @ x
    torch.testing.assert_close(block(x), block.down.weight @ (gate * torch.sigmoid(gate) * (block.up.weight @ x)))


def test_norm_by_hand():
    norm = RMSNorm(4, 0.5, scale=3.0)
    x = torch.tensor([1.0, -2.0, 3.0, 0.0])
    torch.testing.assert_close(norm(x), 3 * x / math.sqrt(14 / 4 + 0.5))


# -- rotary positions -------------------------------------------------------------------------------------------------


def test_rotary_tables_by_hand():
    cosine, sine = rotary_tables(torch.tensor([[0, 5]]), 6, 100.0)
    assert cosine.shape == sine.shape == (1, 2, 6) and cosine.dtype == torch.float32
    angles = [5 * 100.0 ** (-2 * i / 6) for i in range(3)] * 2
    torch.testing.assert_close(cosine[0, 1], torch.tensor([math.cos(a) for a in angles]))
    torch.testing.assert_close(sine[0, 1], torch.tensor([math.sin(a) for a in angles]))
    assert bool((cosine[0, 0] == 1).all()) and bool((sine[0, 0] == 0).all())


def test_only_distances_count():
    layer, x = shaken(TransformerLayer(SIZES)), torch.randn(1, 5, 16)
    near = layer(x, positions=torch.arange(5)[None], is_causal=True)
    far = layer(x, positions=torch.arange(5)[None] + 40, is_causal=True)
    torch.testing.assert_close(near, far, atol=1e-4, rtol=0)
    spread = layer(x, positions=torch.arange(5)[None] * 2, is_causal=True)
    assert float((near - spread).detach().abs().max()) > 1e-2


# -- attention --------------------------------------------------------------------------------------------------------


def attend_plainly(attention, x, visible):
    """One query, one head at a time; query heads share key-value heads in groups."""
    query, key, value = (linear(x) for linear in (attention.query, attention.key, attention.value))
    size, group = attention.head_size, attention.num_heads // attention.num_kv_heads
    rows = []
    for t in range(x.shape[0]):
        heads = []
        for h in range(attention.num_heads):
            own, shared = slice(h * size, (h + 1) * size), slice(h // group * size, (h // group + 1) * size)
            keys = [s for s in range(x.shape[0]) if visible(t, s)]
            scores = torch.stack([query[t, own] @ key[s, shared] / math.sqrt(size) for s in keys])
            heads.append((torch.softmax(scores, 0)[:, None] * value[keys][:, shared]).sum(0))
        rows.append(torch.cat(heads))
    return attention.output(torch.stack(rows))


def test_attention_by_hand():
    attention, x = shaken(Attention(SIZES)), torch.randn(5, 16)
    causal = attend_plainly(attention, x, lambda t, s: s <= t)
    torch.testing.assert_close(attention(x[None], is_causal=True)[0], causal, atol=1e-5, rtol=1e-4)
    both_ways = attend_plainly(attention, x, lambda t, s: True)
    torch.testing.assert_close(attention(x[None])[0], both_ways, atol=1e-5, rtol=1e-4)
    masked = attend_plainly(attention, x, lambda t, s: s != 2 or t == 2)
    mask = torch.tensor([[s != 2 or t == 2 for s in range(5)] for t in range(5)])
    torch.testing.assert_close(attention(x[None], mask=mask[None, None])[0], masked, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 4], [9], [2, 7]])
def test_with_a_cache_rows_may_come_in_any_chunks(chunks):
    layer, x = shaken(TransformerLayer(SIZES)), torch.randn(1, 9, 16)
    whole = layer(x, positions=torch.arange(9)[None], is_causal=True)
    cache, found = LayerCache(), []
    for size in chunks:
        positions = torch.arange(cache.num_rows, cache.num_rows + size)[None]
        mask = (torch.arange(cache.num_rows + size)[None, :] <= positions[0][:, None])[None, None]
        found.append(layer(x[:, positions[0]], positions=positions, mask=mask, cache=cache))
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-4)


# -- the cache --------------------------------------------------------------------------------------------------------


def numbered(start, end):
    keys = torch.arange(float(start), float(end))[None, None, :, None].expand(1, 2, end - start, 3)
    return keys, -keys


def test_cache_grows_and_trims():
    cache = LayerCache()
    expected = []
    for start, end in [(0, 3), (3, 64), (64, 65), (65, 300)]:
        keys, values = cache.append(*numbered(start, end))
        expected += range(start, end)
        assert keys[0, 1, :, 2].tolist() == expected and torch.equal(values, -keys)
    cache.trim(500)
    assert cache.num_rows == 300, "trimming never invents rows"
    cache.trim(10)
    keys, values = cache.append(*numbered(900, 902))
    assert keys[0, 0, :, 0].tolist() == [*range(10), 900, 901] and torch.equal(values, -keys)


def test_norm_under_autocast_is_the_mixed_one_without_its_warning():
    """bfloat16 rows, float32 weight: torch's own mixed result bit for bit, and warnings are errors here."""
    norm = RMSNorm(48, 1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 3.0)
    x = torch.randn(7, 48).bfloat16().requires_grad_()
    torch.set_warn_always(True)  # not only once a process
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = norm(x)
            found.float().square().sum().backward()
    finally:
        torch.set_warn_always(False)
    gradients = x.grad, norm.weight.grad
    x.grad = norm.weight.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.nn.functional.rms_norm(x, (48,), norm.weight, 1e-5)
        expected.float().square().sum().backward()
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert torch.equal(gradients[0], x.grad)
    torch.testing.assert_close(gradients[1], norm.weight.grad)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("length", "dtype"), [(5, torch.float32), (5, torch.float64), (40, torch.bfloat16)])
def test_mix_in_products_equals_torchs_attention(length, dtype, is_causal):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, length, 8, dtype=dtype) for heads in (6, 2, 2))
    inputs = [t.requires_grad_() for t in (query, key, value)]
    mixed = mix(query, key, value, None, is_causal=is_causal)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in (query, key, value)), is_causal=is_causal, enable_gqa=True
    )
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(mixed.double(), expected, atol=tolerance, rtol=0)
    towards = torch.randn_like(expected)
    gradients = torch.autograd.grad((mixed.double() * towards).sum(), inputs)
    for found, wanted in zip(gradients, torch.autograd.grad((expected * towards).sum(), inputs), strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), atol=10 * tolerance, rtol=0)


@pytest.mark.parametrize("wanted", ["both", "weight"])
def test_the_trained_norm_has_the_gradient_of_its_equation(wanted):
    norm = RMSNorm(12, 1e-5).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 3.0)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=wanted == "both")
    inputs = (x, norm.weight) if wanted == "both" else (norm.weight,)
    upstream = torch.randn(3, 5, 12, dtype=torch.float64)
    found, expected = norm(x), torch.nn.functional.rms_norm(x, (12,), norm.weight, 1e-5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )
