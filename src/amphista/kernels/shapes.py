"""Few numbers of rows instead of any: on a CPU torch has a product of bfloat16 compiled for each shape that it meets
first (oneDNN), which takes 2 to 20 ms, longer than many a product. Rows that nobody reads make the numbers even."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_STEP = 32


def even(number: int) -> int:
    """The next of at most 16 numbers between two powers of two: an eighth more, or 31 rows."""
    step = max(LEAST_STEP, 1 << max(0, number.bit_length() - 4))
    return -(-number // step) * step


def is_compiled_for(rows: Tensor) -> bool:
    """Whether products of such rows are compiled for their number."""
    return rows.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def evened(index: Tensor) -> Tensor:
    """An index [M] of rows for products, its last repeated up to an even number, where shapes are compiled for."""
    if not is_compiled_for(index) or not len(index):
        return index
    return torch.cat([index, index[-1:].expand(even(len(index)) - len(index))])
