"""Drafting in fixed shapes: what a parallel-head drafter computes, on buffers that stay, recorded once and replayed.

Two functions are recorded. *Feeding* gives up to T rows to the staged adaptation layers, whose caches then lie at fixed
addresses (stage_buffer.py); padded rows write to a row that belongs to nobody and are seen by none. *Asking* makes the
best R tokens of all heads, which come to the host in one copy. Everything else (lookup, trims, the rows of a prompt) is
the drafter's own. Threads take turns, call by call: each call leaves nothing behind that another would have to keep.

Law: the same candidates as the drafter as it is, whatever the order of feeding, trimming and asking.

Shapes: T rows of the bucket, t of the call, C capacity, D hidden size, W of rows with taps, K heads, R ranks.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from amphista.drafter.amphista import Amphista
from amphista.drafter.base import Ask, Calibration, Drafter, DrafterState, Look
from amphista.drafter.heads import ParallelHeads
from amphista.drafter.ranked import Ranked
from amphista.drafter.stage_buffer import StageBuffer, StageRows
from amphista.errors import CaptureError
from amphista.kernels.graph import Inputs, Recorded, Recorder, bucket, capacities
from amphista.tree.candidates import Candidates

ROWS = (1, 2, 4, 8, 16, 32)  # fed at once; more are read as they are
FIRST_CAPACITY = 256


class FeedRegion:
    """Up to T rows through the staged adaptation layers: features [1, D] of the last, keys and values into `buffer`."""

    def __init__(self, heads: Amphista, buffer: StageBuffer, features: list[Tensor], num_rows: int) -> None:
        device, self._scratch = buffer.rows.device, buffer.capacity
        self._heads, self.features, self.num_rows = heads, features, num_rows
        parts = (num_rows, num_rows, num_rows, 1)
        self._inputs = Inputs(parts, device)
        self.positions, self.slots, self.next_ids, self.last = self._inputs.device
        self.hidden = torch.zeros(num_rows, heads.spec.row_width(heads.taps), dtype=heads.dtype, device=device)
        self.caches = [StageRows(rows, self.slots) for rows in buffer.rows]
        self.slots.fill_(self._scratch)  # recorded on padding alone

    def load(self, hidden: Tensor, next_ids: Tensor, num_past: int) -> None:
        """Hand over rows [t, W] and the tokens [t] that followed them, behind `num_past` other rows."""
        size = len(next_ids)
        positions, slots, _, last = self._inputs.host()
        rows = range(num_past, num_past + size)
        positions[:size], positions[size:] = rows, 0
        slots[:size], slots[size:] = rows, self._scratch
        last[0] = size - 1
        self._inputs.send()
        self.next_ids[:size].copy_(next_ids)
        self.hidden[:size].copy_(hidden)

    def run(self) -> None:
        stages = self._heads.adapt(self.hidden[None], self.next_ids[None], self.positions[None], self.caches)
        for feature, stage in zip(self.features, stages, strict=True):
            feature.copy_(stage.index_select(1, self.last)[0])


class AskRegion:
    """The best R tokens of all heads, and what stands below each where they know paths: all in float64, which holds ids
    and log-probabilities exactly, one behind the other, so that one copy brings them."""

    def __init__(
        self, heads: ParallelHeads, features: list[Tensor], pending: Tensor, divisors: Tensor, num_ranks: int
    ) -> None:
        self._heads, self.divisors, self._num_ranks = heads, divisors, num_ranks
        self._state = DrafterState(features=features if isinstance(heads, Amphista) else features[0], pending=pending)
        num_heads, vocab = heads.num_heads, heads.draft_vocab
        shapes: list[tuple[int, ...]] = [(num_heads, num_ranks)] * 2
        if heads.path is not None and num_heads > 1:
            size = min(heads.config.path_shortlist, vocab)
            width = min(max(num_ranks, heads.config.path_shortlist), vocab)
            shapes = [(num_heads, width)] * 2 + [(num_heads - 1, size, min(num_ranks, size))] * 2
        self._shapes, self._sizes = shapes, [math.prod(shape) for shape in shapes]
        self.offers = torch.zeros(sum(self._sizes), dtype=torch.float64, device=heads.device)

    def run(self) -> None:
        ranked = self._heads.ranked(self._heads.draft_states([self._state]), self.divisors[None], self._num_ranks)
        parts = [part for part in ranked if part is not None]
        for place, part in zip(self.offers.split(self._sizes), parts, strict=True):
            place.copy_(part.flatten())

    def candidates(self, max_depth: int | None) -> Candidates:
        """What was found, of the first `max_depth` heads, on the host."""
        parts = self.offers.to("cpu", copy=True).split(self._sizes)  # what is asked next is written over these
        token_ids, log_probs, *below = (part.view(1, *shape) for part, shape in zip(parts, self._shapes, strict=True))
        if below:
            below[0] = below[0].long()
        return Ranked(token_ids.long(), log_probs, *below).candidates([max_depth or len(token_ids[0])])[0]


class CapturedDrafter(Drafter):
    """Heads that draft in fixed shapes; in everything else they are the drafter it stands around."""

    def __init__(self, heads: ParallelHeads) -> None:
        super().__init__()
        self.name, self.taps, self._heads = heads.name, heads.taps, heads
        self._staged = heads if isinstance(heads, Amphista) and len(heads.stages) else None
        size, device = heads.spec.hidden_size, heads.device
        shapes = [(1, size)] * 2 if isinstance(heads, Amphista) else [(size,)]
        with torch.inference_mode():
            self._features = [torch.zeros(shape, dtype=heads.dtype, device=device) for shape in shapes]
            self._pending = torch.zeros((), dtype=torch.long, device=device)
            self._divisors = torch.ones(heads.num_heads, 1, device=device)
        self._divided: Calibration | None = None
        self._owner: weakref.ref[DrafterState] | None = None  # whose features are in the buffers
        self._recorder = Recorder(device)
        self._feeds: Recorded[FeedRegion] = Recorded(self._recorder)
        self._asks: Recorded[AskRegion] = Recorded(self._recorder)
        self._stage_buffers: dict[int, StageBuffer] = {}
        self._lock = threading.Lock()
        self.why_not_captured: str | None = None

    @property
    def num_heads(self) -> int:
        return self._heads.num_heads

    @property
    def row_bytes(self) -> int:
        return self._heads.row_bytes

    def start(self) -> DrafterState:
        return self._heads.start()

    def copy(self, state: DrafterState, num_rows: int) -> DrafterState:
        with self._turn():
            return self._heads.copy(state, num_rows)

    def trim(self, state: DrafterState, num_rows: int) -> None:
        with self._turn():
            self._heads.trim(state, num_rows)

    @torch.inference_mode()
    def commit(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        num_rows = bucket(len(next_ids), ROWS)
        with self._turn():
            if self._is_recorded and self._staged is not None and num_rows is not None:
                try:
                    self._feed(self._staged, state, hidden, next_ids, num_rows)
                except CaptureError as error:
                    self._uncapture(error)
                else:
                    return
            self._heads.commit(state, hidden, next_ids)

    def head_temperatures(self, temperature: float = 0.0) -> list[float]:
        return self._heads.head_temperatures(temperature)

    @torch.inference_mode()
    def draft(self, state: DrafterState, num_ranks: int, max_depth: int | None = None) -> Candidates:
        with self._turn():
            if self._is_recorded:
                try:
                    return self._ask(state, min(num_ranks, self._heads.draft_vocab), max_depth)
                except CaptureError as error:
                    self._uncapture(error)
            return self._heads.draft(state, num_ranks, max_depth)

    def draft_all(self, asks: Sequence[Ask], num_ranks: int, look: Look | None = None) -> list[Candidates]:
        """Several at once are asked without a recorded function: there is one for a single sequence."""
        if len(asks) == 1:
            return super().draft_all(asks, num_ranks)
        self.commit_all(asks)
        with self._turn():
            return self._heads.draft_all([replace(ask, hidden=None, next_ids=()) for ask in asks], num_ranks)

    @torch.inference_mode()
    def prepare(self, num_ranks: int, num_rows: int) -> None:
        """Record now what feeding up to so many rows and asking for so many ranks will replay."""
        with self._turn():
            try:
                if self._is_recorded:
                    self._record_ahead(num_ranks, num_rows)
            except CaptureError as error:
                self._uncapture(error)

    def _record_ahead(self, num_ranks: int, num_rows: int) -> None:
        if num_ranks > 0:
            self._ask_region(min(num_ranks, self._heads.draft_vocab))
        if self._staged is not None:
            self._take_buffers(DrafterState())  # recording writes to them
            for capacity in capacities(FIRST_CAPACITY, num_rows):
                for size in ROWS:
                    self._feed_region(self._staged, self._stage_buffer(self._staged, capacity), size)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Nobody else reads or writes the buffers and the states that live in them meanwhile."""
        with self._lock:
            self._recorder.follow()
            yield

    @property
    def _is_recorded(self) -> bool:
        return self.why_not_captured is None

    def _feed(self, heads: Amphista, state: DrafterState, hidden: Tensor, next_ids: Tensor, num_rows: int) -> None:
        for cache in state.caches:
            cache.trim(state.num_rows)  # what a commit that was broken off has left
        size = state.num_rows + len(next_ids)
        buffer = self._stage_buffer_for(heads, state, size)
        self._take_buffers(state)  # first: recording writes to them
        region, replay = self._feed_region(heads, buffer, num_rows)
        buffer.attach(state)
        region.load(hidden, next_ids, state.num_rows)
        replay()
        for cache in state.caches:
            cache.num_rows = size
        state.features, state.num_rows = self._features, size

    def _ask(self, state: DrafterState, num_ranks: int, max_depth: int | None) -> Candidates:
        region, replay = self._ask_region(num_ranks)
        if state.features is not self._features:
            self._take_buffers(state)
            features = state.features if isinstance(state.features, list) else [state.features]
            for buffer, feature in zip(self._features, features, strict=True):
                buffer.copy_(feature)
        if self._divided is not self._heads.calibration:
            self._divisors.copy_(torch.tensor(self._heads.head_temperatures())[:, None])
            self._divided = self._heads.calibration
        if state.pending is not None:
            self._pending.copy_(state.pending)
        replay()
        return region.candidates(max_depth)

    def _feed_region(
        self, heads: Amphista, buffer: StageBuffer, num_rows: int
    ) -> tuple[FeedRegion, Callable[[], None]]:
        key = num_rows, buffer.capacity
        return self._feeds.get(key, lambda: FeedRegion(heads, buffer, self._features, num_rows))

    def _ask_region(self, num_ranks: int) -> tuple[AskRegion, Callable[[], None]]:
        calibration = self._heads.calibration
        coverage = None if calibration is None else calibration.coverage  # a constant of the recorded function
        key = num_ranks, coverage
        return self._asks.get(
            key, lambda: AskRegion(self._heads, self._features, self._pending, self._divisors, num_ranks)
        )

    def _take_buffers(self, state: DrafterState) -> None:
        """Let the features in the buffers be this state's; who had them there before gets a copy."""
        owner = None if self._owner is None else self._owner()
        if owner is not None and owner is not state and owner.features is self._features:
            owner.features = [feature.clone() for feature in self._features]
        self._owner = weakref.ref(state)

    def _stage_buffer_for(self, heads: Amphista, state: DrafterState, num_rows: int) -> StageBuffer:
        """Where a state has room for so many rows: where it lives, if that will do."""
        for buffer in self._stage_buffers.values():
            if num_rows <= buffer.capacity and buffer.holds(state):
                return buffer
        return self._stage_buffer(heads, capacities(FIRST_CAPACITY, num_rows)[-1])

    def _stage_buffer(self, heads: Amphista, capacity: int) -> StageBuffer:
        if capacity not in self._stage_buffers:
            try:
                self._stage_buffers[capacity] = StageBuffer(heads, capacity)
            except torch.OutOfMemoryError as error:
                raise CaptureError(f"no memory for {capacity} rows at fixed addresses") from error
        return self._stage_buffers[capacity]

    def _uncapture(self, error: CaptureError) -> None:
        """Go on with the drafter as it is, and say so once."""
        self.why_not_captured = str(error)
        warnings.warn(f"{self.name} drafts without captured graphs, slower: {error}", RuntimeWarning, stacklevel=3)


def captured(heads: Drafter, *, is_static: bool) -> Drafter:
    """The heads for a target that verifies in fixed shapes, or does not."""
    return CapturedDrafter(heads) if is_static and isinstance(heads, ParallelHeads) and heads.is_capturable else heads
