"""The C step's forward as Python records: what step.c computes, over spans of any number of sequences.

Tensors are handed over by address and kept alive here; nothing of `transformers` is known. One forward a thread at a
time shares a model with those of other threads: room to work in is kept for each thread.

Shapes: N rows of all spans, W rows whose logits are asked for, D hidden size, V vocabulary, J key-value heads, E head
size.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
import time
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amphista.errors import NativeError
from amphista.native.build import load
from amphista.native.crew import CREW
from amphista.native.layers import DecoderShape, LayerStruct, NativeLayer, StackStruct, padded, stack_record
from amphista.native.weights import PAD, Address, ProductStruct, Weight

MOST_KEPT = 1 << 24  # numbers of a result whose room is kept
WRONG = {
    1: "its spans do not follow each other",
    2: "a parent does not come before its row in the same span",
    3: "a token id is outside the vocabulary",
    4: "a position is beyond the rotary table",
    5: "a cache has no room for its rows",
    6: "logits of a row are asked for that is not there",
    7: "the workspace is too small",
    8: "a tap is asked for that is no layer's",
}


class _Model(ctypes.Structure):
    _fields_ = [
        ("stack", StackStruct),
        ("norm", Address),
        *((name, ProductStruct) for name in ("embedding", "head")),
        *((name, ctypes.c_float) for name in ("embedding_scale", "input_scale")),
    ]


class _Span(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.POINTER(Address)) for name in ("keys", "values")),
        ("capacity", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("first", "count", "committed", "unused")),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, Address) for name in ("ids", "parents")),
        ("spans", ctypes.POINTER(_Span)),
        ("turns", Address),
        *((name, ctypes.c_int32) for name in ("num_rows", "num_spans", "num_turns", "num_threads")),
        *((name, Address) for name in ("waited", "inputs")),
        *((name, ctypes.POINTER(Address)) for name in ("prefix_keys", "prefix_values")),
        *((name, ctypes.c_int32) for name in ("num_inputs", "prefix_rows")),
    ]


class _Forward(ctypes.Structure):
    _fields_ = [
        ("batch", _Batch),
        *((name, Address) for name in ("wanted", "taps", "hidden", "logits", "choices", "workspace")),
        ("workspace_bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_wanted", "num_taps")),
    ]


@dataclass(frozen=True)
class NativeSpan:
    """One sequence's part of a forward.

    token_ids, parents: of each node; a parent is an earlier node, or -1: then it follows the committed rows.
    rows: all L layers' keys, then their values [2 L, J, capacity, E]; new ones are written behind the `num_committed`.
    """

    token_ids: Sequence[int]
    parents: Sequence[int]
    rows: Tensor
    num_committed: int


class NativeProbes:
    """What rows of token -1 - j are in a forward: inputs [M, D] in place of embeddings, and a prefix of P rows that
    they see in every layer, all layers' keys, then their values [2 L, J, P, E], of the caches' type."""

    def __init__(self, inputs: Tensor, prefix: Tensor) -> None:
        self._inputs, self._prefix, number = inputs.float().contiguous(), prefix.contiguous(), len(prefix) // 2
        addresses = [layer.data_ptr() for layer in self._prefix]
        self._pointers = [(Address * number)(*half) for half in (addresses[:number], addresses[number:])]

    def lend(self, batch: _Batch) -> None:
        """Let a batch read them."""
        keys, values = (ctypes.cast(part, ctypes.POINTER(Address)) for part in self._pointers)
        batch.inputs, batch.prefix_keys, batch.prefix_values = self._inputs.data_ptr(), keys, values
        batch.num_inputs, batch.prefix_rows = len(self._inputs), self._prefix.shape[2]


@dataclass(frozen=True)
class NativeOutput:
    """hidden: float32 [N, (1 + taps) * D] after the final norm, taps behind. logits: float32 [W, V], or none [0, V].
    choices: of each of the W rows, the lowest id of its largest logit, before a family caps them; -1 where they are no
    finite numbers."""

    hidden: Tensor
    logits: Tensor
    choices: list[int]


class NativeModel:
    """A decoder in C. raises NativeError where the step cannot be built or does not fit."""

    def __init__(
        self,
        shape: DecoderShape,
        layers: Sequence[NativeLayer],
        norm: Tensor,
        embedding: Weight,
        head: Weight,
        *,
        flags: tuple[str, ...] | None = None,
    ) -> None:
        self._library = load(flags)
        _check_sizes(self._library)
        self._library.amphista_workspace.restype = ctypes.c_int64
        self.hidden_size, self.vocab_size = embedding.num_inputs, head.num_outputs
        self.cache_dtype = torch.bfloat16 if embedding.weight.dtype is torch.bfloat16 else torch.float32
        self._held: list[Any] = [embedding, head]
        stack = stack_record(shape, layers, self.hidden_size, self.cache_dtype, self._held)
        scales = shape.embedding_scale, shape.input_scale
        self._model = _Model(stack, padded(norm, self._held), embedding.record(), head.record(), *scales)
        self.shape, self.num_layers = shape, len(layers)
        self._workspace, self._logits, self._no_logits = Workspace(), Room(), torch.empty(0, self.vocab_size)

    def forward(
        self,
        spans: Sequence[NativeSpan],
        wanted: Sequence[int],
        turns: Tensor,
        taps: Sequence[int] = (),
        probes: NativeProbes | None = None,
        *,
        has_logits: bool = True,
    ) -> NativeOutput:
        """One forward over the flat row of all spans' tokens.

        wanted: rows whose logits are asked for; has_logits: not only which is the largest. turns: rotary table,
        complex64 [positions, rotations, E / 2]. taps: after how many layers states are asked for, too. probes: what
        token ids below 0 are. Keys and values of the new rows are written in place.
        """
        num_rows, num_wanted = sum(len(span.token_ids) for span in spans), len(wanted)
        # little of torch: behind a forward nothing of it is in the processor's caches, and each call is dear
        flat = array("i", [*_ids(spans), *_parents(spans), *wanted, *taps, *[0] * num_wanted])
        (start, _), choices = flat.buffer_info(), len(flat) - num_wanted
        hidden = torch.empty(num_rows, (1 + len(taps)) * self.hidden_size)
        logits = self._logits.empty(num_wanted, self.vocab_size) if has_logits else self._no_logits
        batch = _Batch(
            start,
            start + 4 * num_rows,
            self._spans(spans),
            turns.data_ptr(),
            num_rows,
            len(spans),
            len(turns),
            num_threads := CREW.num_threads(),
            ctypes.addressof(waited := ctypes.c_double()),
        )
        if probes is not None:
            probes.lend(batch)
        forward = _Forward(
            batch,
            start + 8 * num_rows,
            start + 8 * num_rows + 4 * num_wanted,
            hidden.data_ptr(),
            logits.data_ptr() if has_logits else None,
            start + 4 * choices,
            num_wanted=num_wanted,
            num_taps=len(taps),
        )
        needed = self._library.amphista_workspace(ctypes.byref(self._model), ctypes.byref(forward))
        forward.workspace, forward.workspace_bytes = self._workspace.address(needed), needed
        started = time.perf_counter()
        code = self._library.amphista_forward(ctypes.byref(self._model), ctypes.byref(forward))
        CREW.note(num_threads, waited.value, time.perf_counter() - started)
        if code:
            raise NativeError(f"the C step refuses a forward: {WRONG.get(code, code)}")
        return NativeOutput(hidden, logits, flat[choices:].tolist())

    @property
    def experts(self) -> list[Any]:
        """The records of all layers' experts."""
        layers = self._model.stack.layers
        return [layers[index].experts.contents for index in range(self.num_layers) if layers[index].experts]

    def _pointers(self, span: NativeSpan) -> tuple[Any, Any]:
        """Addresses of all layers' keys, and of their values."""
        rows, number = span.rows, 2 * self.num_layers
        shape = (number, self.shape.num_key_value_heads, rows.shape[2], self.shape.head_size)
        if rows.shape != shape or rows.dtype is not self.cache_dtype or not rows.is_contiguous():
            raise NativeError(
                f"the C step refuses a cache of {tuple(rows.shape)}, {rows.dtype}: expected {shape}, "
                f"{self.cache_dtype}, contiguous"
            )
        return _addresses(rows.data_ptr(), rows.stride(0) * rows.element_size(), self.num_layers)

    def _spans(self, spans: Sequence[NativeSpan]) -> Any:
        records, first = [], 0
        for span in spans:
            count = len(span.token_ids)
            records.append(_Span(*self._pointers(span), span.rows.shape[2], first, count, span.num_committed))
            first += count
        return (_Span * len(records))(*records)


@functools.lru_cache(maxsize=1024)
def _addresses(start: int, size: int, number: int) -> tuple[Any, Any]:
    """Two lists of so many addresses, `size` bytes apart; the same in every step of a sequence."""
    halves = (range(first, first + number * size, size) for first in (start, start + number * size))
    keys, values = (ctypes.cast((Address * number)(*half), ctypes.POINTER(Address)) for half in halves)
    return keys, values


class Workspace:
    """Room to work in, kept by each thread for its next call."""

    def __init__(self) -> None:
        self._local = threading.local()

    def address(self, num_bytes: int) -> int:
        """Of so many bytes, at a multiple of PAD."""
        room: Tensor | None = getattr(self._local, "room", None)
        if room is None or room.numel() < num_bytes + PAD:
            room = self._local.room = torch.empty(num_bytes * 5 // 4 + PAD, dtype=torch.uint8)
        return -(-room.data_ptr() // PAD) * PAD


class Room:
    """Room for one result of each thread, which the next one takes as soon as nobody holds it any more: of megabytes
    that are allocated anew the system clears every page, step after step."""

    def __init__(self) -> None:
        self._local = threading.local()

    def empty(self, *shape: int) -> Tensor:
        """A float32 tensor of this shape, whatever stands in it."""
        size, local = math.prod(shape), self._local
        if size > MOST_KEPT:
            return torch.empty(shape)
        room: np.ndarray[Any, Any] | None = getattr(local, "room", None)
        if room is None or room.size < size or local.lent() is not None:  # whatever is made of it holds this part
            room = local.room = torch.empty(size).numpy()  # at a multiple of 64 bytes, which numpy's is not
        part = room[:size]
        local.lent = weakref.ref(part)
        return torch.from_numpy(part).view(shape)


def _ids(spans: Sequence[NativeSpan]) -> list[int]:
    return [token for span in spans for token in span.token_ids]


def _parents(spans: Sequence[NativeSpan]) -> list[int]:
    """Of all rows, counted in the flat row."""
    parents: list[int] = []
    for span in spans:
        first = len(parents)
        parents += [parent if parent < 0 else parent + first for parent in span.parents]
    return parents


def _check_sizes(library: ctypes.CDLL) -> None:
    sizes = (ctypes.c_int64 * 6)()
    library.amphista_sizes(sizes)
    ours = [ctypes.sizeof(record) for record in (ProductStruct, LayerStruct, _Model, _Span, _Forward)]
    if list(sizes)[:5] != ours:
        raise NativeError(f"the C step has records of {list(sizes)[:5]} bytes: expected {ours}")
