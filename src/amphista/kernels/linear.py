"""Linear layers for decoding: frozen weights, packed once for the few rows a step has.

A generic matrix product doubles its cost from one row to two; oneDNN on weights in its own blocked order stays nearly
flat up to about 8 rows, and is no slower for the hundreds of a prefill, so one packed copy serves both. Where it cannot
be used (other devices or types, builds without it) the plain product takes its place. Rows do not mix: each row's
result depends on that row alone, up to rounding.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from amphista.kernels.onednn import packed_products

PROBED_ROWS = 64
_ONE_ROW_DIFFERS: dict[tuple[int, int], bool] = {}  # by outputs and inputs


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can hold this weight in its own order here."""
    return weight.device.type == "cpu" and packed_products(weight.dtype) is not None


class Product(ABC):
    """y = x W^T + b for rows x, with a frozen weight kept as a kernel likes it best."""

    num_outputs: int
    num_inputs: int
    is_packed: bool  # in an order of its own: the weight it was made from is read no more

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes a product reads: the weight and what belongs to it."""

    @abstractmethod
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None: ...

    @classmethod
    def of(cls, *layers: nn.Linear) -> Self:
        """One layer, or several of the same input side by side: their outputs follow each other."""
        return cls.side_by_side([cls.weight_of(layer) for layer in layers], [layer.bias for layer in layers])

    @staticmethod
    def weight_of(layer: nn.Linear) -> Tensor:
        """What of a layer is multiplied with."""
        return layer.weight

    @classmethod
    def side_by_side(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Self:
        """Weights [O, I] of the same I and their biases, None for 0, as one product."""
        if len(weights) == 1:
            return cls(weights[0], biases[0])
        if all(bias is None for bias in biases):
            return cls(torch.cat(list(weights)))
        columns = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        return cls(torch.cat(list(weights)), torch.cat(columns))

    @abstractmethod
    def __call__(self, rows: Tensor) -> Tensor:
        """[N, I] -> [N, O]; under `torch.inference_mode` or `no_grad` only."""

    @abstractmethod
    def added(self, rows: Tensor, residual: Tensor) -> Tensor:
        """residual [N, O] + the product."""

    def __deepcopy__(self, memo: object) -> Self:
        """Itself: nothing in it ever changes, and packed storage cannot be copied as a tensor."""
        return self


class PackedLinear(Product):
    """y = x W^T + b for x [N, I]; W [O, I] is copied where it is packed, else held as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = True) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self.dtype = weight.dtype
        self.bias = None if bias is None else bias.detach().clone()
        self.is_packed = pack and can_pack(weight)
        with torch.inference_mode():
            plain = weight.detach().contiguous()
            if self.is_packed:
                products = packed_products(self.dtype)
                assert products is not None
                self._weight = products.pack(plain)
                self._multiply, self._multiply_add = products.multiply, products.multiply_add
                self._pairs = self.dtype is torch.bfloat16 and self._one_row_differs()
            else:
                self._weight = plain

    def _one_row_differs(self) -> bool:
        """Whether one row alone is summed in another order than beside others; found out once for each shape.

        Packed products of 2, 3, ... rows give each row the same bits. For some shapes one row has a kernel of its own.
        """
        shape = self.num_outputs, self.num_inputs
        if shape not in _ONE_ROW_DIFFERS:
            rows = torch.randn(PROBED_ROWS, 2, shape[1], generator=torch.Generator().manual_seed(0)).to(self.dtype)
            alone = (self._multiply(pair[:1], self._weight, None, "none", [], "") for pair in rows)
            beside = (self._multiply(pair, self._weight, None, "none", [], "")[:1] for pair in rows)
            _ONE_ROW_DIFFERS[shape] = not all(map(torch.equal, alone, beside))
        return _ONE_ROW_DIFFERS[shape]

    def __call__(self, rows: Tensor) -> Tensor:
        """[N, I] -> [N, O]; under `torch.inference_mode` or `no_grad` only."""
        if not self.is_packed:
            return functional.linear(rows, self._weight, self.bias)
        if self._pairs and rows.shape[0] == 1:
            return self(torch.cat([rows, rows]))[:1]
        product: Tensor = self._multiply(rows, self._weight, self.bias, "none", [], "")
        return product

    def added(self, rows: Tensor, residual: Tensor) -> Tensor:
        """residual [N, O] + the product, in one pass where packed."""
        if not self.is_packed:
            return residual + functional.linear(rows, self._weight, self.bias)
        if self._pairs and rows.shape[0] == 1:
            return self.added(torch.cat([rows, rows]), torch.cat([residual, residual]))[:1]
        total: Tensor = self._multiply_add(rows, residual, self._weight, self.bias, "add")
        return total

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight and the bias."""
        held = int(self.num_outputs * self.num_inputs * self._weight.element_size())
        return held + (0 if self.bias is None else self.bias.numel() * self.bias.element_size())
