"""Even numbers of rows: few, not much larger, and only where torch compiles for shapes."""

from __future__ import annotations

import torch

from amphista.kernels.shapes import LEAST_STEP, even, evened


def test_even_numbers_are_few_and_little_larger():
    for power in range(16):
        numbers = range(2**power, 2 ** (power + 1))
        found = {even(number) for number in numbers}
        assert len(found) <= 17 and all(even(number) == number for number in found)
        assert all(number <= even(number) < number + max(LEAST_STEP, number / 8 + 1) for number in numbers)


def test_an_index_is_evened_by_its_last_row_where_products_are_in_bfloat16():
    index = torch.arange(5, 75)
    assert evened(index) is index
    with torch.autocast("cpu", torch.bfloat16):
        found = evened(index)
        assert len(evened(index[:0])) == 0
    assert len(found) == even(70) == 96 and found[:70].equal(index) and set(found[70:].tolist()) == {74}
