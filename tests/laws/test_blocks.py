"""A GGUF file's own blocks: the weights, and the bits of every product, are those of the float32 weight they stand for.

The oracle of a block's numbers is the `gguf` package's `dequantize`; of a product's bits, the C step's own with float32
weights. Packed blocks are multiplied by whole numbers: near the product in float64, a row's bits the same in any place.
"""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from amphista.errors import NativeError
from amphista.native.weights import Weight
from tests.gguf_file import HALVES, random_blocks
from tests.laws.test_native import FLAGS, has_compiler, runs_here

KINDS = [Kind.F16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]
KINDS += [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS]
EXTREMES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFBFF]  # of float16: zeros, subnormal, least, largest

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C compiler")


@pytest.fixture(params=FLAGS)
def flags(request):
    if not runs_here(request.param):
        pytest.skip("this processor has no AVX2")
    return FLAGS[request.param]


def blocks_of(kind: Kind, outputs: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks [O, blocks, bytes], of IQ4_NL two at a time, and the float32 numbers they stand for."""
    rows = random_blocks(kind, outputs, inputs, seed)
    plain, size = gguf.dequantize(rows, kind), gguf.GGML_QUANT_SIZES[kind][1] * (1 + (kind is Kind.IQ4_NL))
    return torch.from_numpy(rows.view(np.uint8)).view(outputs, -1, size), torch.from_numpy(plain)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_stands_for_what_gguf_says(kind, flags):
    blocks, plain = blocks_of(kind, 37, 512)
    weight, ids = Weight.of_blocks(blocks), torch.tensor([36, 0, 5, 5, 17])
    assert same_bits(weight.rows(torch.arange(37), flags), plain)
    assert same_bits(weight.rows(ids, flags), plain[ids])
    assert weight.num_bytes == blocks.numel() and weight.rows(ids[:0], flags).shape == (0, 512)
    with pytest.raises(NativeError, match="not among the weight's 37"):
        weight.rows(torch.tensor([37]), flags)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Kind.F16])
def test_the_extremes_of_float16(kind, flags):
    blocks, _ = blocks_of(kind, len(EXTREMES) ** 2, 256)
    places = HALVES.get(kind, (0, 2) if kind in (Kind.Q4_1, Kind.Q5_1) else (0,))  # of scales and minima
    for row, scales in enumerate((a, b) for a in EXTREMES for b in EXTREMES):
        for at, half in zip(places, scales, strict=False):
            blocks[row, :, at], blocks[row, :, at + 1] = half & 255, half >> 8
        if kind is Kind.IQ4_NL:  # the second of two
            blocks[row, :, 18], blocks[row, :, 19] = scales[1] & 255, scales[1] >> 8
    with np.errstate(all="ignore"):
        plain = torch.from_numpy(gguf.dequantize(blocks.flatten(1).numpy(), kind))
    assert same_bits(Weight.of_blocks(blocks).rows(torch.arange(len(blocks)), flags), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_has_the_bits_of_float32(kind, flags):
    numbers = 64 if kind is Kind.IQ4_NL else max(32, gguf.GGML_QUANT_SIZES[kind][0])
    for outputs, inputs in ((1, 256), (35, 256 * 3), (67, numbers * 5), (64, 256 * 66)):
        blocks, plain = blocks_of(kind, outputs, inputs, seed=outputs)
        bias = torch.randn(outputs, generator=torch.Generator().manual_seed(1)) if outputs > 1 else None
        ours, theirs = Weight.of_blocks(blocks, bias), Weight.of(plain, bias)
        rows = torch.randn(9, inputs, generator=torch.Generator().manual_seed(2))
        alone = theirs.multiply(rows[:1], flags)
        for num_rows in range(1, 10) if inputs < 10_000 else (2, 5):
            found = ours.multiply(rows[:num_rows], flags)
            assert same_bits(found, theirs.multiply(rows[:num_rows], flags)) and same_bits(found[:1], alone)


PACKED_KINDS = [kind for kind in KINDS if kind is not Kind.F16]
STRETCH = 32
NO_TILES = ("-march=native", "-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16", "-fopenmp")


def has_tiles() -> bool:
    """Whether the processor has matrix units, which a build may be without."""
    return "amx_tile" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False


@pytest.fixture(params=[0x7F7F, 0x7F], ids=["fine", "coarse"])
def levels(request):
    """The largest whole number of a row: of 16 bits, or of 8."""
    return request.param


def packed_of(kind: Kind, outputs: int, inputs: int, levels: int, seed: int = 0) -> tuple[Weight, torch.Tensor]:
    """A packed weight and its float32 numbers."""
    blocks, plain = blocks_of(kind, outputs, inputs, seed)
    weight = Weight.of_blocks(blocks)
    packed = weight.packed(is_coarse=levels == 0x7F)
    if packed is weight:
        pytest.skip("whole numbers are not quicker on this processor")
    return packed, plain


def rows_of_all_kinds(inputs: int) -> torch.Tensor:
    """Random rows, and some with zeros, tiny, large and equal numbers, and such as need all digits of both signs."""
    rows = torch.randn(40, inputs, generator=torch.Generator().manual_seed(2))
    rows[3], rows[4] = rows[3] * 1e-32, rows[4] * 1e30
    rows[5, ::7] *= 1e3
    rows[6], rows[7, :STRETCH] = 0, 0
    rows[8] = torch.where(rows[8] > 0, 1.0, -1.0) * (2 - 2**-23)
    rows[9] = torch.where(rows[9] > 0, 1.0, -1.0) * (0x7F7F / 2**14)
    rows[10] = -(1 + 2**-14)
    return rows


def steps_of(rows: torch.Tensor, levels: int) -> torch.Tensor:
    """What one more stands for in each number's stretch: [N, I]."""
    most = rows.abs().unflatten(1, (-1, STRETCH)).amax(-1, keepdim=True).double()
    return (most.clamp_min(2.0**-110) / levels).expand(-1, -1, STRETCH).flatten(1)


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_packed_product_is_near_the_exact_one(kind, levels):
    for outputs, inputs in ((1, 256), (35, 256 * 3), (64, 256 * 6)):
        packed, plain = packed_of(kind, outputs, inputs, levels, seed=outputs)
        rows = rows_of_all_kinds(inputs)
        plain = plain.double()
        exact = rows.double() @ plain.T
        reach = plain.unflatten(1, (-1, STRETCH)).abs().amax(-1, keepdim=True).expand(-1, -1, STRETCH).flatten(1)
        allowed = (
            steps_of(rows, levels) * 0.51 + rows.abs().double() * inputs / STRETCH * 2.0**-22
        ) @ reach.T + exact.abs() * 2.0**-23
        assert ((packed.multiply(rows) - exact).abs() <= allowed).all()


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_packed_product_errs_by_what_rounding_its_rows_takes_and_no_more(kind, levels):
    """Rounded numbers are off by up to half a step, evenly spread: times the weights, their minima included."""
    packed, plain = packed_of(kind, 64, 256 * 6, levels)
    rows = torch.randn(64, 256 * 6, generator=torch.Generator().manual_seed(3))
    errors = packed.multiply(rows) - rows.double() @ plain.double().T
    expected = (steps_of(rows, levels).square() / 12) @ plain.double().square().T
    assert 0.9 <= (errors.square() / expected).mean().sqrt() <= 1.1


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_packed_row_has_the_same_bits_beside_any_others(kind, levels):
    packed, _ = packed_of(kind, 67, 768, levels)
    rows = rows_of_all_kinds(768)
    alone = torch.cat([packed.multiply(row[None]) for row in rows])
    for flags in (None, NO_TILES) if has_tiles() else (None,):
        for num_rows in range(1, 41):
            assert same_bits(packed.multiply(rows[:num_rows], flags), alone[:num_rows])
            assert same_bits(packed.multiply(rows[-num_rows:], flags), alone[-num_rows:])


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_packed_weight_takes_about_what_it_takes_in_the_file_and_is_packed_once(kind, levels):
    packed, _ = packed_of(kind, 32, 1024, levels)
    blocks, _ = blocks_of(kind, 32, 1024)
    assert 1 <= packed.num_bytes / blocks.numel() <= 1.2
    assert packed.packed(is_coarse=levels == 0x7F) is packed
    with pytest.raises(NativeError, match="before it is packed"):
        packed.rows(torch.tensor([0]))


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q2_K, Kind.Q6_K])
def test_packed_rows_that_are_too_long_to_be_unpacked_for_all_groups_have_the_same_bits(kind, levels):
    inputs = 129 * STRETCH if kind is Kind.Q4_1 else 136 * STRETCH
    packed, _ = packed_of(kind, 19, inputs, levels)
    rows = rows_of_all_kinds(inputs)
    assert same_bits(packed.multiply(rows), torch.cat([packed.multiply(row[None]) for row in rows]))


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q2_K, Kind.Q6_K])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_packed_row_that_is_not_finite_is_nan_alone(number, kind, levels):
    packed, _ = packed_of(kind, 33, 512, levels)
    rows = torch.randn(5, 512)
    expected = packed.multiply(rows)
    for place in (0, 31, 300, 511):
        broken = rows.clone()
        broken[2, place] = number
        found = packed.multiply(broken)
        assert found[2].isnan().all() and torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_packed_weights_side_by_side_with_others(levels):
    kinds, rows = [(Kind.Q6_K, 40), (Kind.Q4_K, 64), (None, 7), (Kind.Q8_0, 33)], torch.randn(5, 512)
    made = [(blocks_of(kind or Kind.F16, outputs, 512), kind) for kind, outputs in kinds]
    parts = [Weight.of_blocks(b if kind else p).packed(is_coarse=levels == 0x7F) for (b, p), kind in made]
    expected = torch.cat([part.multiply(rows) for part in parts], dim=1)
    assert same_bits(Weight.side_by_side(parts).multiply(rows), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_of_no_rows_is_empty(kind):
    blocks, plain = blocks_of(kind, 35, 512)
    weight, rows = Weight.of_blocks(blocks), torch.zeros(0, 512)
    for form in (weight, weight.packed(), Weight.of(plain), Weight.of(plain.bfloat16()), Weight.of_8_bits(plain)):
        assert form.multiply(rows).shape == (0, 35)


def test_weights_of_several_kinds_side_by_side(flags):
    kinds, rows = [(Kind.Q4_K, 40), (None, 7), (Kind.Q6_K, 64), (Kind.Q8_0, 33)], torch.randn(5, 512)
    made = [(blocks_of(kind or Kind.F16, outputs, 512), kind) for kind, outputs in kinds]
    bias = torch.randn(sum(outputs for _, outputs in kinds)).split([outputs for _, outputs in kinds])
    parts = [Weight.of_blocks(b if kind else p, c) for ((b, p), kind), c in zip(made, bias, strict=True)]
    whole = Weight.side_by_side(parts)
    expected = Weight.of(torch.cat([plain for (_, plain), _ in made]), torch.cat(bias)).multiply(rows, flags)
    assert same_bits(whole.multiply(rows, flags), expected)
    assert whole.num_bytes == sum(part.num_bytes for part in parts)


@pytest.mark.parametrize("shape", [(4, 2, 19), (4, 3, 2)])
def test_blocks_that_the_c_step_does_not_know_are_refused(shape):
    with pytest.raises(NativeError, match="no weights in blocks"):
        Weight.of_blocks(torch.zeros(shape, dtype=torch.uint8))
