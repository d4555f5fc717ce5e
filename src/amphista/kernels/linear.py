"""Linear layers for decoding: frozen weights, and several of one input side by side.

Rows do not mix: each row's result depends on that row alone, up to rounding.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional


class Product(ABC):
    """y = x W^T + b for rows x, with a frozen weight kept as a kernel likes it best."""

    num_outputs: int
    num_inputs: int
    is_copy = False  # whether the weight it was made from is read no more

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

    def added(self, rows: Tensor, residual: Tensor) -> Tensor:
        """residual [N, O] + the product."""
        return residual + self(rows)

    def __deepcopy__(self, memo: object) -> Self:
        """Itself: nothing in it ever changes."""
        return self


class TorchLinear(Product):
    """y = x W^T + b by torch; W [O, I] is held as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self.weight = weight.detach().contiguous()
        self.bias = None if bias is None else bias.detach().clone()

    def __call__(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self.weight, self.bias)

    @property
    def num_bytes(self) -> int:
        parts = [self.weight] if self.bias is None else [self.weight, self.bias]
        return sum(part.numel() * part.element_size() for part in parts)
