"""Products by matrix units, where the processor has them: the bits that rows have alone, and what vectors give."""

from __future__ import annotations

import pytest
import torch

from amphista.errors import NativeError
from amphista.native.build import BEST_FLAGS, find_compiler, load
from amphista.native.weights import Weight

WITHOUT_TILES = (*BEST_FLAGS, "-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
COUNTS = [1, 2, 8, 9, 15, 16, 17, 31, 32, 33, 40, 65, 100]
SHAPES = [(32, 64), (70, 64), (33, 576), (64, 96), (31, 64), (200, 1536), (5, 32), (48, 40)]


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        find_compiler()
    except NativeError as error:
        pytest.skip(str(error))


def shaped(shape, of):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
    return weight, of(weight), torch.randn(max(COUNTS), shape[1], generator=generator)


@pytest.mark.parametrize("of", [Weight.of_8_bits, lambda weight: Weight.of(weight.bfloat16())], ids=["8bits", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rows_product_has_the_same_bits_among_any_others(shape, of):
    _, product, rows = shaped(shape, of)
    alone = torch.cat([product.multiply(row[None]) for row in rows])
    for count in COUNTS:
        assert torch.equal(product.multiply(rows[:count]), alone[:count]), f"{count} rows"
    spoilt = rows[:40] * 1e20
    spoilt[33] = rows[33]
    assert torch.equal(product.multiply(spoilt)[33], alone[33])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_bfloat16_they_are_the_products_of_the_rounded_numbers(shape):
    weight, product, rows = shaped(shape, lambda weight: Weight.of(weight.bfloat16(), torch.ones(len(weight))))
    wanted = rows.bfloat16().double() @ weight.bfloat16().double().t() + 1
    for count in COUNTS:
        torch.testing.assert_close(product.multiply(rows[:count]).double(), wanted[:count], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_8_bits_they_are_those_of_a_build_without_tiles_bit_for_bit(shape):
    try:
        load(WITHOUT_TILES)
    except NativeError as error:
        pytest.skip(str(error))
    _, product, rows = shaped(shape, Weight.of_8_bits)
    for count in COUNTS:
        assert torch.equal(product.multiply(rows[:count]), product.multiply(rows[:count], WITHOUT_TILES))


def test_torch_multiplies_by_the_same_units_in_turn_with_us():
    """torch multiplies in bfloat16 by the same units, in the same threads, before, between and behind."""
    _, product, rows = shaped((70, 64), Weight.of_8_bits)
    generator = torch.Generator().manual_seed(1)
    pairs = [
        [torch.randn(size, generator=generator).bfloat16() for size in ((m, k), (k, n))]
        for m, k, n in ((48, 96, 80), (7, 33, 50), (130, 64, 31))
    ]
    before = [a @ b for a, b in pairs]
    wanted = product.multiply(rows)
    for _ in range(3):
        for (a, b), c in zip(pairs, before, strict=True):
            assert torch.equal(product.multiply(rows), wanted)
            assert torch.equal(a @ b, c)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_in_8_bits_a_row_that_is_not_finite_gives_nothing_finite(broken):
    _, product, rows = shaped((70, 40), Weight.of_8_bits)
    for count in (1, 5, 33):
        spoilt = rows[:count].clone()
        spoilt[0, 37] = broken
        found = product.multiply(spoilt)
        assert found[0].isnan().all() and torch.equal(found[1:], product.multiply(rows[:count])[1:])
