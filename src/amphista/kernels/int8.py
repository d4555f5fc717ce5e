"""Linear layers of 8-bit weights: a quarter of the bytes to read, and products of whole numbers.

Each output's weights share a scale (symmetric, largest magnitude 127), and so does each *row* of inputs, taken from
that row alone. Sums of 8-bit products are exact, so a row's result is the same, bit for bit, whatever rows it is
computed with: a tree may be verified with it. A scale over several rows would let a token's neighbours decide.

What it costs is accuracy of the target itself, which is no longer the float32 one.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amphista.errors import TargetError
from amphista.kernels.linear import Product
from amphista.kernels.onednn import ZERO, int8_products

LEVELS = 127


def can_quantise(weight: Tensor) -> bool:
    """Whether this machine multiplies 8-bit numbers without saturating and oneDNN is there to do it."""
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and int8_products() is not None


class Int8Linear(Product):
    """y = x W^T + b for float32 x [N, I], about; W [O, I] is copied, the caller may free its own."""

    is_packed = True

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self.bias = None if bias is None else bias.detach().clone()
        products = int8_products()
        if products is None:
            raise TargetError("this machine, or this torch, has no products of 8-bit numbers: choose another dtype")
        self._multiply = products.multiply
        with torch.inference_mode():
            plain = weight.detach()
            self.scales = plain.abs().amax(1).clamp_min(torch.finfo(plain.dtype).tiny) / LEVELS
            numbers = (plain / self.scales[:, None]).round().to(torch.int8)
            self._weight = products.pack(numbers)
            self._zeros = torch.zeros(self.num_outputs, dtype=torch.int64)
            self._offset = torch.full((1, 1), ZERO + 0.5)

    def __call__(self, rows: Tensor) -> Tensor:
        """[N, I] -> [N, O]; under `torch.inference_mode` or `no_grad` only."""
        numbers, steps = self.quantise(rows)
        product = self._product(numbers).mul_(steps)
        return product if self.bias is None else product.add_(self.bias)

    def added(self, rows: Tensor, residual: Tensor) -> Tensor:
        """residual [N, O] + the product."""
        numbers, steps = self.quantise(rows)
        total = torch.addcmul(residual, self._product(numbers), steps)
        return total if self.bias is None else total.add_(self.bias)

    def quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as numbers of 8 bits [N, I], ZERO added, and what a step of 1 stands for in each row [N, 1]."""
        largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True)
        steps = largest.clamp_min_(torch.finfo(rows.dtype).tiny * LEVELS).mul_(1 / LEVELS)
        return torch.addcmul(self._offset, rows, steps.reciprocal()).to(torch.uint8), steps

    def _product(self, numbers: Tensor) -> Tensor:
        """Whole-number products [N, O], times the outputs' scales."""
        return self._multiply(numbers, self._weight, self.scales, self._zeros)

    @property
    def num_bytes(self) -> int:
        """Bytes a product reads: the weight, its scales, the bias."""
        return self.num_outputs * self.num_inputs + 4 * self.num_outputs * (1 if self.bias is None else 2)
