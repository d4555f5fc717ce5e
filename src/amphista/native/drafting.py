"""The C drafter's weights and calls as Python records: what drafter.c computes, for any number of sequences.

Shapes: B sequences, K heads, S staged layers, D hidden size, N draft vocabulary, R ranks, J key-value heads, E head
size.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from amphista.errors import NativeError
from amphista.native.build import load
from amphista.native.crew import CREW
from amphista.native.layers import DecoderShape, NativeLayer, StackStruct, padded, stack_record
from amphista.native.step import WRONG, Workspace, _Batch, _Span
from amphista.native.weights import PAD, Address, ProductStruct, Weight, address, rounded_up

SlotMask = Literal["bidirectional", "causal", "own"]
SLOT_MASKS: tuple[SlotMask, ...] = get_args(SlotMask)  # drafter.c numbers them so
MOST_ROWS = 1 << 30
FIRST_CAPACITY = 128


class _Stage(ctypes.Structure):
    _fields_ = [("state_norm", Address), ("fuse", ProductStruct)]


class _Path(ctypes.Structure):
    _fields_ = [
        *((name, Address) for name in ("norm", "reads")),
        ("scores", ctypes.POINTER(Address)),
        *((name, ProductStruct) for name in ("state", "output")),
        *((name, ctypes.c_int32) for name in ("rank", "unused")),
    ]


class _Heads(ctypes.Structure):
    _fields_ = [
        *((name, StackStruct) for name in ("stages", "encoder")),
        ("fusing", ctypes.POINTER(_Stage)),
        ("tap_norms", ctypes.POINTER(Address)),
        *((name, Address) for name in ("embedding_norm", "hidden_norm", "slot_positions", "output_norm")),
        *((name, ctypes.POINTER(ProductStruct)) for name in ("blocks", "scores")),
        ("draft_ids", Address),
        ("embedding", ProductStruct),
        ("path", _Path),
        *(
            (name, ctypes.c_int32)
            for name in ("num_heads", "num_blocks", "split", "has_own_scores", "slot_mask", "num_taps")
        ),
        *((name, ctypes.c_float) for name in ("embedding_scale", "logit_cap")),
    ]


class _Draft(ctypes.Structure):
    _fields_ = [
        ("batch", _Batch),
        *((name, Address) for name in ("hidden", "features", "divisors", "pending")),
        *((name, Address) for name in ("tokens", "below", "log_probs", "log_probs_below", "workspace")),
        ("workspace_bytes", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("depth", "ranks", "parents", "children")),
        ("log_coverage", ctypes.c_float),
        ("unused", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class NativePath:
    """A path correction of one rank, in float32. reads: of each token of the draft vocabulary [N, 2 rank]; scores: what
    moves a token's [N, rank], once for all heads or once each. The rank is a multiple of PAD."""

    norm: Tensor
    reads: Tensor
    scores: Sequence[Tensor]
    state: Weight
    output: Weight
    rank: int
    shortlist: int


@dataclass(frozen=True, kw_only=True)
class NativeParts:
    """What parallel heads are made of. blocks: [blocks][K]; scores: over the draft vocabulary, one or K.

    stages: each staged layer's norm of states and fuse beside `layers`; tap_norms: of what the first fuses, too, behind
    the embedding; slot_positions [K, D]; logit_cap: what logits stay below in size, 0: nothing; draft_ids ascending.
    """

    shape: DecoderShape
    hidden_size: int
    embedding: Weight
    stages: Sequence[tuple[Tensor, Weight]]
    tap_norms: Sequence[Tensor]
    layers: Sequence[NativeLayer]
    encoder: Sequence[NativeLayer]
    slot_mask: SlotMask
    embedding_norm: Tensor | None
    hidden_norm: Tensor | None
    output_norm: Tensor | None
    slot_positions: Tensor | None
    blocks: Sequence[Sequence[Weight]]
    split: int
    scores: Sequence[Weight]
    logit_cap: float
    draft_ids: Tensor | None
    path: NativePath | None
    cache_dtype: torch.dtype


class StageCache:
    """Keys and values of the staged layers of one sequence [S, 2, J, C, E], and what its last row left for the heads
    [2, D]."""

    def __init__(self, shape: tuple[int, int, int], hidden_size: int, dtype: torch.dtype) -> None:
        """shape: S, J, E."""
        num_stages, key_heads, head_size = shape
        self.rows = torch.empty(num_stages, 2, key_heads, 0, head_size, dtype=dtype)
        self.features = torch.zeros(2, rounded_up(hidden_size, PAD))
        self._pointers: Any = None

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self.rows.numel() * self.rows.element_size()

    def span(self, first: int, count: int, num_rows: int) -> _Span:
        """The next `count` rows behind `num_rows`, with room for them."""
        if not len(self.rows):
            return _Span(None, None, MOST_ROWS, first, count, num_rows)
        if num_rows + count > self.rows.shape[3] or self._pointers is None:
            self._grow(num_rows, num_rows + count)
        keys, values = self._pointers
        return _Span(keys, values, self.rows.shape[3], first, count, num_rows)

    def copied(self, num_rows: int) -> StageCache:
        """The first rows, in storage of their own."""
        num_stages, _, key_heads, capacity, head_size = self.rows.shape
        copy = StageCache((num_stages, key_heads, head_size), self.features.shape[1], self.rows.dtype)
        copy.rows = self.rows[:, :, :, : min(num_rows, capacity)].clone(memory_format=torch.contiguous_format)
        return copy

    def trim(self, num_rows: int) -> None:
        """Nothing: what lies behind the rows there are is written over."""

    def _grow(self, num_rows: int, needed: int) -> None:
        """Room for so many rows, the first of which are kept."""
        capacity = self.rows.shape[3]
        if needed > capacity:
            grown = self.rows.new_empty(*self.rows.shape[:3], max(FIRST_CAPACITY, 2 * needed), self.rows.shape[4])
            grown[:, :, :, :num_rows] = self.rows[:, :, :, :num_rows]
            self.rows = grown
        parts = [[stage[which].data_ptr() for stage in self.rows] for which in range(2)]
        self._pointers = tuple(ctypes.cast((Address * len(part))(*part), ctypes.POINTER(Address)) for part in parts)


@dataclass(frozen=True)
class Fed:
    """One sequence of a call: its cache, the rows that are in it, and tokens of new rows with their hidden states and
    taps [T or more, (1 + taps) * D], float32; none: None."""

    cache: StageCache
    num_rows: int
    token_ids: Sequence[int] = ()
    hidden: Tensor | None = None


@dataclass(frozen=True)
class DraftQuery:
    """What is asked of all sequences: `depth` heads, R ranks, and of paths so many children. divisors: of logits
    [B, depth], float32; pending: what is read of the tokens already chosen [B, 2 rank], where heads have not."""

    depth: int
    num_ranks: int
    divisors: np.ndarray[Any, Any]
    log_coverage: float = 0.0
    pending: Tensor | None = None


class NativeHeads:
    """Parallel heads in C. raises NativeError where the library cannot be built."""

    def __init__(self, parts: NativeParts, *, flags: tuple[str, ...] | None = None) -> None:
        self._library = load(flags)
        _check_sizes(self._library)
        self._library.amphista_draft_workspace.restype = ctypes.c_int64
        self.parts, self._workspace = parts, Workspace()
        self._held: list[Any] = [parts]
        self._heads = self._record(parts)

    def _record(self, parts: NativeParts) -> _Heads:
        held = self._held
        stages = (_Stage * len(parts.stages))(
            *(_Stage(padded(norm, held), fuse.record()) for norm, fuse in parts.stages)
        )
        taps = (Address * len(parts.tap_norms))(*(padded(norm, held) for norm in parts.tap_norms))
        positions, ids = parts.slot_positions, parts.draft_ids
        positions = None if positions is None else positions.detach().float().contiguous()
        ids = None if ids is None else ids.to(torch.int32).contiguous()
        held += [stages, taps, positions, ids]
        stacks = [
            stack_record(parts.shape, layers, parts.hidden_size, parts.cache_dtype, held)
            for layers in (parts.layers, parts.encoder)
        ]
        norms = (parts.embedding_norm, parts.hidden_norm)
        return _Heads(
            *stacks,
            stages,
            taps,
            *(padded(norm, held) for norm in norms),
            address(positions),
            padded(parts.output_norm, held),
            _products([weight for block in parts.blocks for weight in block], held),
            _products(parts.scores, held),
            address(ids),
            parts.embedding.record(),
            self._path_record(parts.path),
            len(parts.blocks[0]),
            len(parts.blocks),
            parts.split,
            len(parts.scores) > 1,
            SLOT_MASKS.index(parts.slot_mask),
            len(parts.tap_norms),
            parts.shape.embedding_scale,
            parts.logit_cap,
        )

    def _path_record(self, path: NativePath | None) -> _Path:
        if path is None:
            return _Path()
        scores = (Address * len(path.scores))(*(table.data_ptr() for table in path.scores))
        self._held.append(scores)
        norm = padded(path.norm, self._held)
        return _Path(norm, path.reads.data_ptr(), scores, path.state.record(), path.output.record(), path.rank)

    def new_cache(self) -> StageCache:
        """For a new sequence."""
        shape = self.parts.shape
        sizes = len(self.parts.stages), shape.num_key_value_heads, shape.head_size
        return StageCache(sizes, self.parts.hidden_size, self.parts.cache_dtype)

    def run(self, fed: Sequence[Fed], turns: Tensor | None, query: DraftQuery | None = None) -> list[Any]:
        """Feed and ask in one call. turns: rotary table, complex64 [positions, E / 2].

        -> token ids and log-probabilities [B][depth][R], and where heads know paths, `ConditionalRanks` as arrays.
        """
        ids: list[int] = []
        spans, hidden, features = [], [], []
        for one in fed:
            spans.append(one.cache.span(len(ids), len(one.token_ids), one.num_rows))
            ids += one.token_ids
            features.append(one.cache.features.data_ptr())
            if one.hidden is not None:
                hidden.append(one.hidden if len(fed) == 1 else one.hidden[: len(one.token_ids)])
        rows = None if not hidden else (torch.cat(hidden) if len(hidden) > 1 else hidden[0]).contiguous()
        flat = np.array(ids, dtype=np.int32)
        batch = _Batch(
            flat.ctypes.data,
            None,
            (_Span * len(spans))(*spans),
            address(turns),
            len(ids),
            len(spans),
            MOST_ROWS if turns is None else len(turns),
            num_threads := CREW.num_threads(),
            ctypes.addressof(waited := ctypes.c_double()),
        )
        draft = _Draft(batch, address(rows), ctypes.addressof(places := (Address * len(features))(*features)))
        found = [] if query is None else self._answers(draft, query, len(fed))
        heads, call = ctypes.byref(self._heads), ctypes.byref(draft)
        draft.workspace_bytes = self._library.amphista_draft_workspace(heads, call)
        draft.workspace = self._workspace.address(draft.workspace_bytes)
        started = time.perf_counter()
        code = self._library.amphista_draft(heads, call)
        CREW.note(num_threads, waited.value, time.perf_counter() - started)
        if code:
            raise NativeError(f"the C step refuses a draft: {WRONG.get(code, code)}")
        del places
        return [part.tolist() for part in found[:2]] + found[2:]

    def _answers(self, draft: _Draft, query: DraftQuery, num_sequences: int) -> list[np.ndarray[Any, Any]]:
        """Room for what will be found."""
        depth, vocab, path = query.depth, self.parts.scores[0].num_outputs, self.parts.path
        ranks, parents = min(query.num_ranks, vocab), 0
        if path is not None and depth > 1:
            parents = min(path.shortlist, vocab)
            ranks = max(ranks, parents)
        children = min(query.num_ranks, parents)
        shapes = [(num_sequences, depth, ranks)] + [(num_sequences, depth - 1, parents, children)] * bool(parents)
        found = [np.empty(shape, kind) for shape in shapes for kind in (np.int32, np.float32)]
        draft.divisors, draft.pending = query.divisors.ctypes.data, address(query.pending)
        draft.tokens, draft.log_probs = found[0].ctypes.data, found[1].ctypes.data
        if parents:
            draft.below, draft.log_probs_below = found[2].ctypes.data, found[3].ctypes.data
        draft.depth, draft.ranks, draft.parents, draft.children = depth, ranks, parents, children
        draft.log_coverage = query.log_coverage
        return found


def _products(weights: Sequence[Weight], held: list[Any]) -> Any:
    records = (ProductStruct * len(weights))(*(weight.record() for weight in weights))
    held += [weights, records]
    return records


def _check_sizes(library: ctypes.CDLL) -> None:
    sizes = (ctypes.c_int64 * 4)()
    library.amphista_draft_sizes(sizes)
    ours = [ctypes.sizeof(record) for record in (_Stage, _Path, _Heads, _Draft)]
    if list(sizes) != ours:
        raise NativeError(f"the C drafter has records of {list(sizes)} bytes: expected {ours}")
