"""Passes over many rows, in C (training.c), where products are in bfloat16 on a CPU: training's, and the torch form's.

Shapes: M rows, I inner size, P target distributions, N vocabulary, D size of a norm.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from amphista.errors import NativeError
from amphista.native.build import load
from amphista.native.weights import PAD, Address, rounded_up

LANES = 16  # the most that a vector has


class _CrossEntropies(ctypes.Structure):
    """CrossEntropies of training.c."""

    _fields_ = [
        *((name, Address) for name in ("probs", "aims", "labels", "logits", "losses", "right", "room")),
        *((name, ctypes.c_int64) for name in ("rows", "len")),
        *((name, ctypes.c_float) for name in ("soft", "text")),
        *((name, ctypes.c_int32) for name in ("threads", "wants_gradient")),
    ]


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return load()
    except NativeError:
        return None


def norms(x: Tensor, weight: Tensor) -> bool:
    """Whether rows [..., D] under this weight are normed here: where autocast would round them to bfloat16 anyway."""
    in_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    kinds = x.dtype in (torch.float32, torch.bfloat16) and weight.dtype is torch.float32 and x.device.type == "cpu"
    return in_bf16 and kinds and x.shape[-1] % LANES == 0 and _library() is not None


def passes(rows: Tensor, size: int) -> bool:
    """Whether rows of a target, with no gradient to take, are normed and activated here in pieces of `size` numbers."""
    of_kind = rows.dtype is torch.bfloat16 and rows.device.type == "cpu" and rows.is_contiguous()
    return of_kind and not rows.requires_grad and size % LANES == 0 and _library() is not None


def gated(rows: Tensor) -> Tensor:
    """Rows [gate ; up] [M, 2 I], contiguous -> silu(gate) up [M, I]."""
    library, out = _library(), rows.new_empty(len(rows), rows.shape[1] // 2)
    assert library is not None
    library.amphista_gated(*_places(rows), *_sizes(out), *_places(out), ctypes.c_int(torch.get_num_threads()))
    return out


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [M, D], contiguous -> (its norm in bfloat16 [M, D], 1 / rms of each row [M])."""
    library, out, scales = _library(), torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(len(x))
    assert library is not None
    library.amphista_norm(
        ctypes.c_int(x.dtype is torch.bfloat16), *_places(x, weight), *_sizes(x), ctypes.c_float(eps),
        *_places(out, scales), ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip
    return out, scales


def norm_gradient(x: Tensor, upstream: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x, of the weight) for an upstream gradient in bfloat16 [M, D], contiguous."""
    library, of_x = _library(), torch.empty_like(x)
    assert library is not None
    of_weights = torch.zeros(torch.get_num_threads(), x.shape[1])
    library.amphista_norm_gradient(
        ctypes.c_int(x.dtype is torch.bfloat16), *_places(x, upstream, weight, scales), *_sizes(x),
        *_places(of_x, of_weights), ctypes.c_int(len(of_weights)),
    )  # fmt: skip
    return of_x, of_weights.sum(0)


def reads(logits: Tensor) -> bool:
    """Whether these logits are of the kind that is read here, and there is a compiler."""
    of_kind = logits.dtype is torch.bfloat16 and logits.device.type == "cpu" and logits.is_contiguous()
    return of_kind and logits.shape[-1] > 0 and _library() is not None


def softmax(logits: Tensor, out: Tensor) -> None:
    """Logits [M, N] -> distributions in float32, into `out` [M, N]."""
    library, room = _library(), _room(logits.shape[1])
    assert library is not None and out.is_contiguous()
    threads = ctypes.c_int(torch.get_num_threads())
    library.amphista_softmax(*_places(logits), *_sizes(logits), *_places(out, room), threads)


def cross_entropies(
    logits: Tensor, target_probs: Tensor, aims: Tensor, labels: Tensor, weights: tuple[float, float], wanted: bool
) -> tuple[Tensor, Tensor]:
    """(losses [M], whether the label is a row's first largest logit [M]); the logits become their gradient if wanted.

    logits [M, N], target_probs [P, N] in float32, aims [M] among P, labels [M] or -1; weights: of the distribution and
    of the text.
    """
    library, room = _library(), _room(logits.shape[1])
    assert library is not None and target_probs.dtype is torch.float32 and target_probs.is_contiguous()
    aims, labels = aims.contiguous(), labels.contiguous()
    losses, right = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.bool)
    kept = (target_probs, aims, labels, logits, losses, right, room)
    record = _CrossEntropies(
        *(t.data_ptr() for t in kept), *logits.shape, *weights, torch.get_num_threads(), int(wanted)
    )
    library.amphista_cross_entropies(ctypes.byref(record))
    return losses, right


def _room(size: int) -> Tensor:
    return torch.empty(torch.get_num_threads() * rounded_up(size, PAD))


def _places(*tensors: Tensor) -> list[Address]:
    return [Address(t.data_ptr()) for t in tensors]


def _sizes(rows: Tensor) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in rows.shape]
