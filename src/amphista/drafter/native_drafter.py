"""Parallel heads that decode in C (native/drafter.c): the same weights as the modules they were trained as.

Weights are rounded to 8 bits, whatever the target's: a draft decides nothing, and a quarter of the bytes is read.
Norms, sums, keys and values are not. Feeding and asking any number of sequences is one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from amphista.drafter.base import Ask, DrafterState
from amphista.drafter.layers import LayerSizes, RMSNorm, TransformerLayer, rotary_angles
from amphista.drafter.path import PathCorrection
from amphista.drafter.ranked import candidates_of
from amphista.errors import NativeError
from amphista.kernels.parts import RotaryTable, paired
from amphista.native.drafting import DraftQuery, Fed, NativeHeads, NativeParts, NativePath, SlotMask, StageCache
from amphista.native.huge_pages import Arena
from amphista.native.layers import DecoderShape, NativeLayer, NativeMlp
from amphista.native.weights import PAD, Weight, rounded_up
from amphista.target.spec import SharedWeights
from amphista.tree.candidates import Candidates

_ARENA = Arena()


@dataclass(frozen=True, kw_only=True)
class Modules:
    """What a family of heads is made of. blocks: residual blocks of each head, as many of all; the heads below `split`
    read the first stage; stages: norm of states, fuse, layer, the first reading taps, too, through norms of their own;
    encoder: layers over the slots."""

    sizes: LayerSizes
    blocks: Sequence[Sequence[Any]]
    split: int = 0
    stages: Sequence[tuple[Any, Any, Any]] = ()
    tap_norms: Sequence[Any] = ()
    encoder: Sequence[Any] = ()
    slot_mask: SlotMask = "bidirectional"
    slot_positions: Tensor | None = None
    embedding_norm: RMSNorm | None = None
    hidden_norm: RMSNorm | None = None
    output_norm: RMSNorm | None = None
    reads_pending: bool = False  # the first head is corrected by the token already chosen


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What heads score with. weights: over the draft vocabulary with biases, one pair for all heads or one each."""

    shared: SharedWeights
    weights: Sequence[Any]
    draft_ids: Tensor | None


class NativeDrafter:
    """Feeds and asks trained heads in C."""

    def __init__(
        self,
        modules: Modules,
        scores: Scores,
        path: PathCorrection | None,
        shortlist: int,
        *,
        exact: bool = False,
        flags: tuple[str, ...] | None = None,
    ) -> None:
        """exact: weights stay as they are. raises NativeError."""
        dtype = modules.blocks[0][0].linear.weight.dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise NativeError(f"it has no weights of {str(dtype).removeprefix('torch.')}")
        weight = _as_it_is if exact else _of_8_bits
        sizes, self._path = modules.sizes, path if modules.reads_pending else None
        self._embed = scores.shared.embed
        parts = NativeParts(
            shape=DecoderShape(
                sizes.num_attention_heads,
                sizes.num_key_value_heads,
                sizes.head_size,
                sizes.norm_eps,
                sizes.head_size**-0.5,
                embedding_scale=scores.shared.embedding_scale,
            ),
            hidden_size=sizes.hidden_size,
            embedding=scores.shared.native_embedding,
            stages=[(norm.weight, weight(fuse.weight)) for norm, fuse, _ in modules.stages],
            tap_norms=[norm.weight for norm in modules.tap_norms],
            layers=[_layer(layer, weight, turned=True) for _, _, layer in modules.stages],
            encoder=[_layer(layer, weight, turned=False) for layer in modules.encoder],
            slot_mask=modules.slot_mask,
            embedding_norm=_weight_of(modules.embedding_norm),
            hidden_norm=_weight_of(modules.hidden_norm),
            output_norm=_weight_of(modules.output_norm),
            slot_positions=modules.slot_positions,
            blocks=[
                [weight(block.linear.weight, block.linear.bias) for block in blocks]
                for blocks in zip(*modules.blocks, strict=True)
            ],
            split=modules.split,
            scores=[weight(*pair) for pair in scores.weights],
            logit_cap=scores.shared.logit_cap,
            draft_ids=scores.draft_ids,
            path=None if path is None else _path(path, scores, shortlist),
            cache_dtype=dtype,
        )
        self._heads = NativeHeads(parts, flags=flags)
        self._rotary = _rotary_table(sizes) if modules.stages else None

    def start(self) -> DrafterState:
        """An empty state."""
        return DrafterState(caches=[self._heads.new_cache()])

    def feed(self, state: DrafterState, hidden: Tensor, next_ids: list[int]) -> None:
        """Append rows."""
        asks = [Ask(state, 0, hidden=hidden, next_ids=next_ids)]
        self._pending(asks)
        self._run(asks)

    def draft(
        self, asks: Sequence[Ask], num_ranks: int, divisors: Sequence[list[float]], log_coverage: float
    ) -> list[Candidates]:
        """Feed and ask; divisors of all heads' logits, of each sequence."""
        depths = [min(ask.max_depth, len(divisors[0])) for ask in asks]
        deepest = max(depths)
        table = np.array([row[:deepest] for row in divisors], dtype=np.float32)
        return candidates_of(
            self._run(asks, DraftQuery(deepest, num_ranks, table, log_coverage, self._pending(asks))), depths
        )

    def _run(self, asks: Sequence[Ask], query: DraftQuery | None = None) -> list[Any]:
        fed, furthest = [], 0
        for ask in asks:
            state, hidden = ask.state, ask.hidden
            furthest = max(furthest, state.num_rows + len(ask.next_ids))
            cache: StageCache = state.caches[0]
            fed.append(Fed(cache, state.num_rows, ask.next_ids, None if hidden is None else hidden.float()))
        turns = None if self._rotary is None else self._rotary.reserve(furthest)
        found = self._heads.run(fed, turns, query)
        for ask in asks:
            ask.state.num_rows += len(ask.next_ids)
        return found

    def _pending(self, asks: Sequence[Ask]) -> Tensor | None:
        """What heads that do not read the pending tokens are corrected by [B, 2 * rank], for now and for later."""
        if self._path is None:
            return None
        for ask in asks:
            if ask.next_ids:
                read = self._path.read(self._embed(torch.tensor(ask.next_ids[-1])))  # alone: the same bits
                ask.state.pending = _both_filled(read)
        return torch.stack([ask.state.pending for ask in asks if ask.state.pending is not None])


def _as_it_is(weight: Tensor, bias: Tensor | None = None) -> Weight:
    return Weight.of(weight, bias)


def _of_8_bits(weight: Tensor, bias: Tensor | None = None) -> Weight:
    return Weight.of_8_bits(weight.detach().float(), bias, _ARENA)


def _weight_of(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight


def _layer(layer: TransformerLayer, weight: Callable[[Tensor], Weight], *, turned: bool) -> NativeLayer:
    """turned: rows are rotated to their positions."""
    attention, mlp, size = layer.attention, layer.mlp, layer.sizes.head_size
    parts = [attention.query.weight, attention.key.weight, attention.value.weight]
    if turned:
        parts[:2] = [paired(part, size) for part in parts[:2]]
    return NativeLayer(
        layer.attention_norm.weight,
        weight(torch.cat(parts)),
        None,
        None,
        weight(attention.output.weight),
        layer.mlp_norm.weight,
        NativeMlp(*(weight(part.weight) for part in (mlp.gate, mlp.up, mlp.down))),
        None,
    )


def _path(path: PathCorrection, scores: Scores, shortlist: int) -> NativePath:
    """What moves a token's score is worked out for all of them: W_x U, of as many numbers as the rank has."""
    ids = torch.arange(scores.shared.native_embedding.num_outputs) if scores.draft_ids is None else scores.draft_ids
    output = _filled(path.output.weight)
    return NativePath(
        path.state_norm.weight,
        _both_filled(path.read(scores.shared.embed(ids))),
        [weights[0].float() @ output for weights in scores.weights],
        Weight.of(_both_filled(path.state.weight.T).T.contiguous(), _both_filled(path.state.bias)),
        Weight.of(output),
        output.shape[1],
        shortlist,
    )


def _filled(numbers: Tensor) -> Tensor:
    """[..., rank] -> float32 [..., rank in whole vectors], zeros behind."""
    rank = numbers.shape[-1]
    return pad(numbers.detach().float(), (0, rounded_up(rank, PAD) - rank)).contiguous()


def _both_filled(numbers: Tensor) -> Tensor:
    """The same of the halves of [..., 2 * rank]."""
    return _filled(numbers.unflatten(-1, (2, -1))).flatten(-2)


def _rotary_table(sizes: LayerSizes) -> RotaryTable:
    def make(num_positions: int) -> Tensor:
        angles = rotary_angles(torch.arange(num_positions), sizes.head_size, sizes.rope_theta)
        return torch.polar(torch.ones_like(angles), angles)

    return RotaryTable(make)
