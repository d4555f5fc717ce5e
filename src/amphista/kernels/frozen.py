"""Modules that will not be trained any more: their linear layers are packed in place, the unpacked weights freed.

What they compute is unchanged up to rounding. They hold no parameters any more: they cannot be saved.
"""

from __future__ import annotations

from torch import Tensor, nn

from amphista.kernels.linear import PackedLinear, can_pack


class FrozenLinear(nn.Module):
    """A packed linear layer; inputs [..., I] -> [..., O], without gradients."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.product = PackedLinear.of(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def pack_linears(module: nn.Module) -> None:
    """Replace every linear layer inside `module` that can be packed here; others stay as they are."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, FrozenLinear(child))
        else:
            pack_linears(child)
