"""What a function must not do to be recorded as a CUDA graph, watched on a CPU: ask the device for a value, make a
shape from one, or bring anything over from the host."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    "_local_scalar_dense",  # int(tensor), float(tensor), .item(), bool(tensor.all())
    "is_nonzero",
    "item",
    "equal",
    "allclose",
    "nonzero",  # also indexing by a bool mask
    "nonzero_numpy",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "histc",
    "repeat_interleave",
    "_assert_async",
}
COMES_FROM_THE_HOST = {"lift", "lift_fresh", "lift_fresh_copy"}  # torch.tensor([...]), as_tensor(...)


class Capturable(TorchDispatchMode):
    """Raises at the first operation that a capture would refuse; `names` are those that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # in here the watch is off; what the parts do counts
                decomposed = func.decompose(*args, **(kwargs or {}))
            if decomposed is not NotImplemented:
                return decomposed
        name = func.overloadpacket.__name__
        if name in WAITS or name in COMES_FROM_THE_HOST:
            raise AssertionError(f"{func} cannot be captured")
        if name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise AssertionError("indexing by a bool mask cannot be captured: its size is a value")
        self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def capturable():
    """Whatever runs inside must be capturable."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(), Capturable() as watch:
        for name in ("tolist", "cpu", "numpy"):  # these reach no dispatcher where the tensor is on the CPU already
            patch.setattr(torch.Tensor, name, _refused(name))
        yield watch


def _refused(name):
    def refuse(*args, **kwargs):
        raise AssertionError(f"Tensor.{name} cannot be captured")

    return refuse


def buffers_of(region) -> dict[str, tuple[int, torch.Size, tuple[int, ...]]]:
    """Address, shape and strides of every tensor a region keeps."""
    found = {}
    fields = {**vars(region), "staged": region._inputs._staged} if hasattr(region, "_inputs") else vars(region)
    for name, value in fields.items():
        for place, tensor in enumerate(value if isinstance(value, list | tuple) else [value]):
            parts = vars(tensor) if hasattr(tensor, "append") and hasattr(tensor, "slots") else {"": tensor}
            for part, held in parts.items():
                if isinstance(held, torch.Tensor):
                    found[f"{name}.{place}.{part}"] = (held.data_ptr(), held.shape, held.stride())
    return found
