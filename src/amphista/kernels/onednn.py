"""The private operators of torch on which fast products on a CPU rest: looked up and tried here, nowhere else.

torch promises nothing about them; another version may rename them, or change what they take and mean. So each set is
tried once on small numbers against plain arithmetic. What is missing, refuses or differs is not used: the plain product
takes its place, and 8-bit weights are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

PACKED_ROWS = 16  # rows the packed order is chosen for: fastest or as fast as any other from 1 to 256 in our sweep
ZERO = 128  # 8-bit inputs are stored unsigned; oneDNN has no fast kernel for signed ones
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class Products(NamedTuple):
    """`pack` brings a weight [O, I] into an order of its own, which the products [N, I] -> [N, O] read."""

    pack: Callable[[Tensor], Tensor]
    multiply: Callable[..., Tensor]
    multiply_add: Callable[..., Tensor]


class Int8Products(NamedTuple):
    """`multiply`: unsigned numbers [N, I], packed ones [O, I], scales and zeros [O] -> float32 [N, O]."""

    pack: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def supports(*names: str) -> bool:
    """Whether the processor has one of these, by the names of torch's own questions."""
    asked = (getattr(torch.cpu, name, None) for name in names)
    return any(ask is not None and ask() for ask in asked)


def operator(namespace: str, name: str) -> Any:
    """One of torch's operators, None where this torch has none of the name."""
    return getattr(getattr(torch.ops, namespace), name, None)


@cache
def packed_products(dtype: torch.dtype) -> Products | None:
    """Products with packed weights of this type, None where they cannot be used here."""
    if dtype not in TOLERANCE or not torch.backends.mkldnn.is_available():
        return None
    try:
        if dtype is torch.bfloat16 and not operator("mkldnn", "_is_mkldnn_bf16_supported")():
            return None
        multiply, reorder = operator("mkldnn", "_linear_pointwise"), operator("mkldnn", "_reorder_linear_weight")
        found = Products(lambda weight: reorder(weight, PACKED_ROWS), multiply.default, multiply.binary)
        return found if _packed_are_right(found, dtype) else None
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        return None


def _packed_are_right(found: Products, dtype: torch.dtype) -> bool:
    rows, weight, residual = (
        torch.arange(float(n * m)).sin().view(n, m).to(dtype) for n, m in ((3, 8), (5, 8), (3, 5))
    )
    with torch.inference_mode():
        packed, plain = found.pack(weight), functional.linear(rows, weight, residual[0])
        product = found.multiply(rows, packed, residual[0], "none", [], "")
        total = found.multiply_add(rows, residual, packed, residual[0], "add")
        differences = (product - plain).abs().max(), (total - plain - residual).abs().max()
    return all(bool(difference <= TOLERANCE[dtype]) for difference in differences)


@cache
def int8_products() -> Int8Products | None:
    """Products of 8-bit numbers, None where they would saturate or are not there."""
    if not supports("_is_vnni_supported"):
        return None
    try:
        prepack, pointwise = operator("onednn", "qlinear_prepack"), operator("onednn", "qlinear_pointwise")

        def multiply(numbers: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
            tail = None, 1.0, 0, torch.float32, "none", list[str](), ""
            product: Tensor = pointwise(numbers, 1.0, ZERO, packed, scales, zeros, *tail)
            return product

        found = Int8Products(lambda numbers: prepack(numbers, None), multiply)
        return found if _int8_are_right(found) else None
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        return None


def _int8_are_right(found: Int8Products) -> bool:
    rows, weight = torch.arange(96).view(3, 32) * 2 % 256, torch.arange(160).view(5, 32) * 7 % 255 - 127
    scales = torch.arange(1.0, 6.0)
    with torch.inference_mode():
        packed = found.pack(weight.to(torch.int8))
        product = found.multiply(rows.to(torch.uint8), packed, scales, torch.zeros(5, dtype=torch.int64))
    return torch.equal(product, ((rows - ZERO) @ weight.T) * scales)
