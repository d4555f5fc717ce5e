"""Early-exit self-drafting after M2R2 (arXiv 2502.02040): the target's first layers, and a stream that runs ahead.

    a_0 .. a_X  = the target's own residuals of a token, before its first and behind each of X layers
    p_l         = p_{l-1} + (a_l - a_{l-1}) + U_l SiLU(V_l [n(p_{l-1}) ; n(a_l)]),    p_0 = a_0
    z           = LM(n_o(p_X))

The exit of x_{t+k} scores x_{t+1+k}: head 1 is the exit of the pending token, head k that of the token drafted above,
by the same weights. Drafted tokens go through the X layers in rounds. They see the target's own keys and values of the
text and, beside them, those made for their path, which end with the draft: the target's cache is read, never written.
Only a target on its fast path lends its layers.

Known, from the abstract: a second stream of residuals, ahead of the target's, that shares its keys and values, and
self-speculation by it. Ours: the adapters' form, norms, one exit for all depths, objectives, the start at U = 0, which
is plain early exit (`rank = 0` stays there). Not here: routers, and a verification that goes on from the residuals that
were drafted with; it would save X/L of one forward a step.

Shapes: B sequences, T rows, P selected rows, n paths, i drafted rows of a path, X of the target's L layers, K heads, H
query heads, J key-value heads, E head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amphista.drafter import path_rows
from amphista.drafter.base import MAX_SIZE, DrafterConfig, DrafterState, check_range
from amphista.drafter.layers import RMSNorm
from amphista.drafter.rounds import Paths, SequentialHeads
from amphista.errors import ConfigError, DrafterError
from amphista.target.spec import SharedWeights, TargetSpec


@dataclass(frozen=True, kw_only=True)
class EarlyExitConfig(DrafterConfig):
    """`exit_layer`: X, by default a third of the target's layers. `rank`: of the adapters, 0 for none."""

    num_heads: int = 4
    exit_layer: int | None = None
    rank: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("rank", self.rank, 0, MAX_SIZE)


class Adapter(nn.Module):
    """U SiLU(V [n(p) ; n(a)]) of states p and a [n, D]; 0 at first."""

    def __init__(self, size: int, rank: int, eps: float) -> None:
        super().__init__()
        self._norm = partial(F.rms_norm, normalized_shape=(size,), eps=eps)
        self.down, self.up = nn.Linear(2 * size, rank, bias=False), nn.Linear(rank, size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, stream: Tensor, residuals: Tensor) -> Tensor:
        added: Tensor = self.up(F.silu(self.down(torch.cat([self._norm(stream), self._norm(residuals)], dim=-1))))
        return added


@dataclass(frozen=True)
class DraftedPaths(Paths):
    """Whose each path is, `owners` [n], ascending, and keys and values [n, X, J, i, E] of its own rows. sequences: the
    states of all, which are not changed."""

    owners: Tensor
    keys: Tensor
    values: Tensor
    sequences: Sequence[DrafterState]


@dataclass(frozen=True)
class TextPaths(Paths):
    """Paths along a text, each of whose rows has an exit [rows, D]: the places `ahead` [n, ..] of those to come."""

    ahead: Tensor
    exits: Sequence[Tensor]

    @classmethod
    def along(cls, ahead: Tensor, exits: Sequence[Tensor]) -> TextPaths:
        """At the first of the places."""
        return cls(exits[0].index_select(0, ahead[:, 0]), ahead[:, 1:], exits)


class EarlyExit(SequentialHeads[DraftedPaths | TextPaths]):
    """The adapters and the norm of the exit; see the module's equations."""

    name = "early-exit"
    config: EarlyExitConfig

    def __init__(self, config: EarlyExitConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        """raises ConfigError for a target that lends no layers."""
        super().__init__(config, spec, shared)
        check_range("exit_layer", config.exit_layer, 1, spec.num_layers)
        if shared.early_layers is None:
            raise ConfigError(
                "an early-exit drafter runs layers of the target, which are lent on its fast path alone, and not where "
                "attention scores are capped (Gemma 2) or have sinks (gpt-oss): load a model of another family that "
                "has one (docs/families.md) with fast=True, or take another drafter"
            )
        self.num_early = config.exit_layer or max(1, spec.num_layers // 3)
        number = self.num_early if config.rank else 0
        self.adapters = nn.ModuleList(Adapter(spec.hidden_size, config.rank, spec.norm_eps) for _ in range(number))
        self.output_norm = RMSNorm(spec.hidden_size, spec.norm_eps)

    def match_scale(self, hidden_rms: float) -> None:
        """The exit begins as a plain one: with the norm that stands before the target's LM head."""
        early = self._shared.early_layers
        assert early is not None
        with torch.no_grad():
            self.output_norm.weight.copy_(early.final_norm)

    def _exit(self, residuals: Sequence[Tensor]) -> Tensor:
        """n_o(p_X) of a_0 .. a_X [n, D]; what the adapters add up to is p_l - a_l."""
        added = torch.zeros_like(residuals[0])
        for before, after, adapter in zip(residuals, residuals[1:], self.adapters, strict=False):
            added = added + adapter(before + added, after)
        exits: Tensor = self.output_norm(residuals[-1] + added)
        return exits

    # -- along a text -------------------------------------------------------------------------------------------------

    def first_along(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> TextPaths:
        """Behind the end of a text its last row stands for those that are missing, which no head counts."""
        length, steps = hidden.shape[1], torch.arange(1, self.num_heads + 1, device=select.device)
        columns = (select % length)[:, None] + steps
        ahead = (select - select % length)[:, None] + columns.clamp_max(length - 1)
        rows, ahead = ahead.unique(return_inverse=True)
        early = self._shared.early_layers
        assert early is not None
        first = early.entered(self._shared.embed(next_ids.flatten()[(rows - 1).clamp_min(0)]))
        behind = hidden.flatten(0, 1).index_select(0, rows).split(self.spec.hidden_size, dim=-1)[1:]
        exits = self._exit([first.to(hidden.dtype), *behind])
        return TextPaths.along(ahead, [exits])

    # -- drafting -----------------------------------------------------------------------------------------------------

    def first(self, states: Sequence[DrafterState]) -> DraftedPaths:
        if any(state.target_cache is None for state in states):
            raise DrafterError("an early-exit drafter reads the target's cache, and was given a sequence without one")
        shape = (len(states), self.num_early, self.spec.num_key_value_heads, 0, self.spec.head_size)
        none = torch.empty(shape, dtype=self._shared.head_weight.dtype, device=self.device)
        pending = torch.stack([state.pending for state in states if state.pending is not None])
        owners = torch.arange(len(states), device=self.device)
        return self._drafted(DraftedPaths(none.new_empty(len(states), 0), owners, none, none, states), pending)

    def next(self, paths: DraftedPaths | TextPaths, tokens: Tensor) -> DraftedPaths | TextPaths:
        if isinstance(paths, TextPaths):
            return TextPaths.along(paths.ahead, paths.exits)
        return self._drafted(paths, tokens)

    def _drafted(self, paths: DraftedPaths, tokens: Tensor) -> DraftedPaths:
        """The first layers for one token more on each path."""
        early = self._shared.early_layers
        assert early is not None
        ends = [state.num_rows + paths.keys.shape[3] for state in paths.sequences]
        made: list[list[Tensor]] = []

        def mix(layer: int, queries: Tensor, *new: Tensor) -> Tensor:
            olds = paths.keys[:, layer], paths.values[:, layer]
            made.append([torch.cat([old, row[:, :, None]], dim=2) for old, row in zip(olds, new, strict=True)])
            firsts = [early.first_seen(layer, end) for end in ends]
            before = self._before(layer, paths, firsts)
            beyond = max(0, firsts[0] - paths.sequences[0].num_rows)  # of its own rows, where a window is that short
            keys, values = (rows[:, :, beyond:] for rows in made[-1])
            return path_rows.mix(queries, keys, values, before)

        positions = [ends[owner] for owner in paths.owners.tolist()]
        residuals = early.read_early(tokens, positions, self.num_early, mix)
        keys, values = (torch.stack(column, dim=1) for column in zip(*made, strict=True))
        states = self._exit([residual.to(self.dtype) for residual in residuals])
        return DraftedPaths(states, paths.owners, keys, values, paths.sequences)

    def _before(self, layer: int, paths: DraftedPaths, firsts: Sequence[int]) -> path_rows.Contexts:
        """What a layer shows of the target's cache, from the rows `firsts` of each sequence on."""
        contexts = []
        for state, first in zip(paths.sequences, firsts, strict=True):
            assert state.target_cache is not None
            rows, seen = state.target_cache.layers[layer], slice(first, max(first, state.num_rows))
            assert rows.keys is not None and rows.values is not None
            contexts.append((rows.keys[0, :, seen], rows.values[0, :, seen]))
        sizes = torch.tensor([keys.shape[1] for keys, _ in contexts], device=paths.owners.device)
        return path_rows.Contexts(contexts, paths.owners, sizes.index_select(0, paths.owners))

    def feed(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        state.pending = next_ids[-1]
        state.num_rows += len(next_ids)

    def trim(self, state: DrafterState, num_rows: int) -> None:
        state.num_rows = min(state.num_rows, num_rows)
