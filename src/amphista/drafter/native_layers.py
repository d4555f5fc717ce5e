"""Linear layers of a drafter multiplied in C, for drafters whose whole draft has no form there.

Weights are rounded to 8 bits, whatever the target's, as in `native_drafter.py`: a draft decides nothing, and a quarter
of the bytes is read. What stands between the products stays as it was trained, in float32.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amphista.native.huge_pages import Arena
from amphista.native.weights import Weight

_ARENA = Arena()


class NativeLayer(nn.Module):
    """y = x W^T + b of rows [..., I] -> float32 [..., O], under `torch.inference_mode` or `no_grad` only.

    exact: the weight stays as it is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, exact: bool = False) -> None:
        """raises NativeError where there is no C."""
        super().__init__()
        wide = weight.detach().float()
        self._weight = Weight.of(wide, bias) if exact else Weight.of_8_bits(wide, bias, _ARENA)
        self._weight.multiply(torch.zeros(1, self._weight.num_inputs))  # now, not in mid-answer

    def forward(self, rows: Tensor) -> Tensor:
        product = self._weight.multiply(rows.reshape(-1, rows.shape[-1]).float())
        return product.view(*rows.shape[:-1], -1)


def put_in(module: nn.Module, *, exact: bool) -> None:
    """Multiply in C wherever a module multiplies, and go on in float32; raises NativeError, and does nothing then."""
    found = [(parent, name, layer) for parent in module.modules() for name, layer in parent.named_children()]
    layers = [(parent, name, layer) for parent, name, layer in found if isinstance(layer, nn.Linear)]
    made = [NativeLayer(layer.weight, layer.bias, exact=exact) for _, _, layer in layers]
    for (parent, name, _), native in zip(layers, made, strict=True):
        setattr(parent, name, native)
    for parameter in module.parameters():
        parameter.data = parameter.data.float()
