"""Modules that will not be trained any more: their linear layers are packed in place, the unpacked weights freed.

What they compute is unchanged up to rounding, and so is their `state_dict`: the plain weights are written back into it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from amphista.kernels.linear import PackedLinear, can_pack


class FrozenLinear(nn.Module):
    """A packed linear layer; inputs [..., I] -> [..., O], without gradients."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.product = PackedLinear.of(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.product.plain_weight()
        if self.product.bias is not None:
            destination[prefix + "bias"] = self.product.bias


def pack_linears(module: nn.Module) -> None:
    """Replace every linear layer inside `module` that can be packed here; others stay as they are."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, FrozenLinear(child))
        else:
            pack_linears(child)
