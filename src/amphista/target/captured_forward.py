"""Verification in fixed shapes: the forward of lean.py on buffers that stay, recorded once for each size and replayed.

One recorded forward serves all trees of up to N nodes (a *bucket*) behind up to C rows. What changes from step to step
(tokens, positions, who descends from whom, how many rows are committed) arrives in one tensor of integers, and the mask
is made from it on the device. A smaller tree is padded: a padded node writes its keys and values to a row that belongs
to nobody, sees that row beside the committed ones, and is seen by no node of the tree.

Kept: one persistent buffer of keys and values for each capacity met (they double, so all of them together take less
than twice the largest) and the recorded forwards that were used last. One thread decodes here at a time, since what a
forward shows lies in its buffers; others take the ordinary path of the same forward until that thread rests
(`ThreadLease`). A cache attached here is read and written elsewhere only between a forward and the commit of its path.

Shapes: N nodes of the bucket, n of the tree, C capacity, S = C + 1 rows, W hidden size and taps, V vocabulary.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from amphista.cache.persistent import BufferedCache, PersistentBuffer
from amphista.cache.static import KVCache
from amphista.errors import CaptureError
from amphista.kernels.graph import Inputs, Recorded, Recorder, ThreadLease, bucket, capacities
from amphista.target.attention import Layout
from amphista.target.hidden_states import Taps
from amphista.target.lean import LeanModel
from amphista.target.output import TargetOutput, choices_of
from amphista.target.spec import TargetSpec
from amphista.tree.token_tree import TokenTree

NODES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
FIRST_CAPACITY = 256
BITS = 64


class VerifyRegion:
    """The forward over trees of up to N nodes behind the rows of one persistent buffer, with its inputs and outputs."""

    def __init__(self, model: LeanModel, buffer: PersistentBuffer, sizes: tuple[int, int, int], taps: Taps) -> None:
        """sizes: nodes N, of hidden states with their taps W, vocabulary V."""
        num_nodes, hidden_size, vocab_size = sizes
        self._taps = taps
        device, self._scratch = buffer.rows.device, buffer.capacity
        self._model, self.num_nodes = model, num_nodes
        self._words = -(-num_nodes // BITS)
        parts = (num_nodes, num_nodes, num_nodes, 1, num_nodes * self._words)
        self._inputs = Inputs(parts, device)
        self.tokens, self.positions, self.slots, self.num_past, self.lineage = self._inputs.device
        self._columns = torch.arange(buffer.capacity + 1, device=device)
        self._bits = torch.arange(BITS, device=device)
        self._rows = [[rows] for rows in buffer.scattered(self.slots)]
        model.rotary.reserve(buffer.capacity)
        self.logits = torch.zeros(num_nodes, vocab_size, dtype=model.dtype, device=device)
        self.hidden = torch.zeros(num_nodes, hidden_size, dtype=model.dtype, device=device)
        self.choices = torch.zeros(num_nodes, dtype=torch.int64, device=device)
        self.slots.fill_(self._scratch)  # recorded on a tree of padding alone: it runs without touching any row

    def load(self, tree: TokenTree, num_past: int) -> None:
        """Hand over a tree behind `num_past` committed rows, in one copy to the device."""
        size = tree.num_nodes
        tokens, positions, slots, past, lineage = self._inputs.host()
        tokens[:size], tokens[size:] = tree.tokens, 0
        positions[:size], positions[size:] = np.add(tree.depths, num_past), 0
        slots[:size], slots[size:] = np.arange(num_past, num_past + size), self._scratch
        past[0] = num_past
        packed = b"".join(bits.to_bytes(8 * self._words, "little") for bits in tree.ancestor_bits())
        lineage[: size * self._words], lineage[size * self._words :] = np.frombuffer(packed, np.int64), 0
        self._inputs.send()

    def run(self) -> None:
        visible, key_positions = self._visible()
        layout = Layout(self.positions[None], key_positions[None], visible[None])
        hidden = self._model.states(self.tokens[None], layout, self._rows, self._taps)[0]
        logits = self._model.logits(hidden[:, : hidden.shape[1] // (1 + len(self._taps))])
        self.hidden.copy_(hidden)
        self.logits.copy_(logits)
        self.choices.copy_(choices_of(logits))

    def _visible(self) -> tuple[Tensor, Tensor]:
        """bool [N, S], True where a node may see a row (the window permitting), and the rows' positions [S]."""
        node = self._columns - self.num_past  # which node of the tree a row is; below 0 it is a committed row
        known = node.clamp(0, self.num_nodes - 1)
        is_past, is_node = node < 0, (node >= 0) & (node < self.num_nodes)
        own = self.slots[:, None] == self._columns  # for padding too: a softmax over nothing would be a NaN
        visible = is_past | (is_node & self._ancestors().index_select(1, known)) | own
        return visible, torch.where(is_past, self._columns, self.positions.index_select(0, known))

    def _ancestors(self) -> Tensor:
        """bool [N, N] from the bits that came."""
        words = self.lineage.view(self.num_nodes, self._words, 1)
        bits: Tensor = ((words >> self._bits) & 1).bool()
        return bits.view(self.num_nodes, -1)[:, : self.num_nodes]


class CapturedForward:
    """Verification of one target, recorded by size."""

    def __init__(self, model: LeanModel, spec: TargetSpec) -> None:
        self._model, self._spec = model, spec
        self._device = model.device
        self._recorder = Recorder(self._device)
        self._regions: Recorded[VerifyRegion] = Recorded(self._recorder)
        self._buffers: dict[int, PersistentBuffer] = {}
        self._lock = threading.Lock()
        self.lease = ThreadLease()

    def verify(self, tree: TokenTree, cache: KVCache, taps: Taps = ()) -> TargetOutput | None:
        """One forward over the tree; None for what the ordinary path must read: a tree beyond the largest bucket, a
        cache that cannot live here, another thread. raises CaptureError where the device cannot record it."""
        if not isinstance(cache, BufferedCache):
            return None
        num_nodes = bucket(tree.num_nodes, NODES)
        with self._lock:
            self._recorder.follow()
            if num_nodes is None or not self.lease.take():
                cache.detach()
                return None
            past, size = cache.num_committed, tree.num_nodes
            buffer = self._buffer_for(cache, past + size)
            region, replay = self._region(buffer, num_nodes, taps)
            buffer.attach(cache)
            region.load(tree, past)
            replay()
            choices: list[int] = region.choices.tolist()
            for layer in cache.layers:
                layer.num_rows = past + size
            output = TargetOutput(region.logits[:size], region.hidden[:size], choices[:size])
            self.lease.show(output)
        return output

    def detach(self, cache: KVCache) -> None:
        """Let a cache take its rows along: what follows reads and writes it elsewhere, and may take long."""
        if isinstance(cache, BufferedCache):
            with self._lock:
                self._recorder.follow()
                cache.detach()

    @property
    def num_bytes(self) -> int:
        """Bytes of all persistent buffers."""
        return sum(buffer.rows.numel() * buffer.rows.element_size() for buffer in self._buffers.values())

    def prepare(self, max_nodes: int, num_rows: int, taps: Taps = ()) -> None:
        """Record all sizes up to these now, so that none has to be in mid-answer. raises CaptureError."""
        with self._lock:
            if not self.lease.take():
                return
            for capacity in capacities(FIRST_CAPACITY, min(num_rows, self._most_rows)):
                for num_nodes in NODES[: bisect_left(NODES, max_nodes) + 1]:
                    self._region(self._buffer(min(capacity, self._most_rows)), num_nodes, taps)

    def _region(self, buffer: PersistentBuffer, num_nodes: int, taps: Taps) -> tuple[VerifyRegion, Callable[[], None]]:
        sizes = (num_nodes, self._spec.row_width(taps), self._model.head.num_outputs)
        # layers may be taken away to time the rest
        key = (num_nodes, buffer.capacity, len(self._model.layers), taps)
        return self._regions.get(key, lambda: VerifyRegion(self._model, buffer, sizes, taps))

    def _buffer_for(self, cache: BufferedCache, num_rows: int) -> PersistentBuffer:
        """Where a cache has room for so many rows: where it lives, if that will do."""
        buffer = cache.buffer
        if buffer is not None and num_rows <= buffer.capacity and buffer is self._buffers.get(buffer.capacity):
            return buffer
        return self._buffer(min(capacities(FIRST_CAPACITY, num_rows)[-1], self._most_rows))

    @property
    def _most_rows(self) -> int:
        """A tree is wide also where positions end."""
        return self._spec.max_positions + NODES[-1]

    def _buffer(self, capacity: int) -> PersistentBuffer:
        if capacity not in self._buffers:
            self._buffers[capacity] = self._build(capacity)
        return self._buffers[capacity]

    def _build(self, capacity: int) -> PersistentBuffer:
        """A new persistent buffer; where memory is short, everything kept for other capacities goes first."""
        spec = self._spec
        layers = (spec.num_layers, spec.num_key_value_heads, self._model.head_size)
        try:
            return PersistentBuffer(layers, capacity, self._model.dtype, self._device)
        except torch.OutOfMemoryError:
            self._regions.clear()
            self._buffers.clear()
            torch.cuda.empty_cache()
        try:
            return PersistentBuffer(layers, capacity, self._model.dtype, self._device)
        except torch.OutOfMemoryError as error:
            raise CaptureError(f"no memory for a cache of {capacity} rows at fixed addresses") from error
