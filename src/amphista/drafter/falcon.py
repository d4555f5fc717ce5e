"""Falcon (arXiv 2412.12639), semi-autoregressive: one layer that gives k tokens a pass and goes on from its own states.

    u_j      = F [n_g(h_j) ; n_E(E(x_{j+1}))]                                         rows j <= t, of the context
    g_{t+i}  = Layer(u_{t-k+i} at t-k+i | u_{<=t}),  i = 1..k                          first pass
    u_{t+i}  = F [n_g(g_{t+i}) ; n_E(E(x_{t+1+i}))];   t := t + k                      each further pass, drafted
    z_i      = LM(n_o(g_{t+i}))                                                       scores x_{t+1+i}

The k rows of a block see each other, whatever their order, the blocks above on their path, and the context. What stands
below the tokens of one block knows nothing of them but their depth. F is linear, as EAGLE's, or that with an LSTM on
top (`mixer`). With k = 1 this is EAGLE (a law).

Glancing (`glance_share`, the paper's coupled sequential glancing distillation): in training, of the slots i < k of a
first pass whose token would be missed, a share reads the answer's row, u_{t+i}, in the place of its own, and the block
sees it. The share falls to 0 along the run.

Certain, from the published code: k rows a pass under that mask, from states k positions before, and glancing by such
rows. Not to be had from there: F, an LSTM whose output cannot be used as written. Ours: F, norms, the start at LM(h),
taps as in `eagle.py`, training over all passes, glancing at each missed token by the same chance, objectives, and
`slots = "last"`, where all rows of a block start from its last one and a vector of their own.

Shapes: B sequences, T rows, P selected rows, n paths, k rows of a block, J key-value heads, E head size, D hidden size,
M numbers of memory: D, or 2 D with an LSTM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from amphista.drafter.base import DrafterState, check_range
from amphista.drafter.eagle import EagleConfig, EaglePaths, FusedHeads
from amphista.drafter.layers import LayerCache, mix, rotary_tables
from amphista.drafter.path_rows import Contexts, looked_up, step
from amphista.errors import ConfigError
from amphista.target.spec import SharedWeights, TargetSpec

CHOICES = {"mixer": ("linear", "lstm"), "slots": ("previous", "last")}


@dataclass(frozen=True, kw_only=True)
class FalconConfig(EagleConfig):
    """`num_heads` depths, `block_size` k of them a pass. `glance_share`: of the missed tokens, how many are shown when
    training starts."""

    block_size: int = 2
    mixer: Literal["linear", "lstm"] = "linear"
    slots: Literal["previous", "last"] = "previous"
    glance_share: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("block_size", self.block_size, 1, self.num_heads)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: expected {' or '.join(known)}")
        if not 0 <= self.glance_share <= 1:
            raise ConfigError(f"glance_share is {self.glance_share}: expected a number from 0 to 1")


@dataclass(frozen=True)
class FalconPaths(EaglePaths):
    """`outputs` g [n, k, D] of the last pass and their states, `block` [n, k, D]; `read`, the tokens drafted since [n,
    0..k-1]; `memory` [n, M] of the last row."""

    block: Tensor
    read: Tensor
    memory: Tensor

    @property
    def of_round(self) -> Tensor:
        return self.block


class Recurrence(nn.Module):
    """An LSTM on top of rows: u_j = f_j + r_j, (r_j, c_j) = LSTM(f_j, (u_{j-1}, c_{j-1})); starts as the identity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.read, self.carry = nn.Linear(size, 4 * size), nn.Linear(size, 4 * size, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter[3 * size :].zero_()  # nothing is written at first

    def forward(self, rows: Tensor, memory: Tensor) -> Tensor:
        """f [n, T, D], [u ; c] of the row before [n, 2 D] -> [u ; c] of each row [n, T, 2 D]."""
        (u, c), found = memory.chunk(2, dim=-1), []
        for row, read in zip(rows.unbind(1), self.read(rows).unbind(1), strict=True):
            keep, write, show, new = (read + self.carry(u)).chunk(4, dim=-1)
            c = keep.sigmoid() * c + write.sigmoid() * new.tanh()
            u = row + show.sigmoid() * c.tanh()
            found.append(torch.cat([u, c], dim=-1))
        return torch.stack(found, dim=1).to(rows.dtype)


class Falcon(FusedHeads[FalconPaths]):
    """The full drafter; see the module's equations."""

    name = "falcon"
    config: FalconConfig

    def __init__(self, config: FalconConfig, spec: TargetSpec, shared: SharedWeights) -> None:
        super().__init__(config, spec, shared)
        self.recurrence = Recurrence(spec.hidden_size) if config.mixer == "lstm" else None
        slots = torch.zeros(config.block_size, spec.hidden_size)
        self.slot_positions = nn.Parameter(slots) if config.slots == "last" else None
        self._memory_size = spec.hidden_size * (1 if self.recurrence is None else 2)
        self.at_step(0, 1)

    @property
    def heads_a_round(self) -> int:
        return self.config.block_size

    def _mixed(self, rows: Tensor, memory: Tensor) -> Tensor:
        """Memory [n, T, M] of fused rows [n, T, D] behind the one with this memory [n, M]; u comes first in it."""
        mixed: Tensor = rows if self.recurrence is None else self.recurrence(rows, memory)
        return mixed

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_tables(positions, self.spec.head_size, self.spec.rope_theta)

    def _keys_values(self, memory: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, J, T, E] of rows of the context [B, T, M] at positions [1, T]."""
        layer, u = self.stage.layer, memory[..., : self.spec.hidden_size]
        return layer.attention.keys_values(layer.attention_norm(u), self._rotary(positions))

    def _none(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of paths without rows of their own."""
        none = rows.new_empty(len(rows), self.spec.num_key_value_heads, 0, self.spec.head_size)
        return none, none

    def _asking(self, u: Tensor) -> Tensor:
        """What the outputs of blocks u [n, k, D] start from."""
        return u if self.slot_positions is None else u[:, -1:] + self.slot_positions

    def _behind(
        self, outputs: Tensor, memory: Tensor, before: Contexts, own: tuple[Tensor, Tensor] | None = None
    ) -> FalconPaths:
        """Behind a pass, outputs [n, k, D], and the last row that it has read [n, M]."""
        block, own = self.output_norm(outputs), own or self._none(outputs)
        unread = before.owners.new_empty(len(outputs), 0)
        common = (before.owners, before.seen, *own, before.rows)
        return FalconPaths(block[:, 0], outputs, *common, block=block, read=unread, memory=memory)

    def next(self, paths: FalconPaths, tokens: Tensor) -> FalconPaths:
        read = torch.cat([paths.read, tokens[:, None]], dim=1)
        if read.shape[1] < self.heads_a_round:
            return replace(paths, states=paths.block[:, read.shape[1]], read=read)
        memory = self._mixed(self.stage.fused(paths.outputs, self._embedded(read)), paths.memory)
        u, before = memory[..., : self.spec.hidden_size], Contexts(paths.contexts, paths.owners, paths.seen)
        outputs, *own = step(self.stage.layer, u, (paths.keys, paths.values), before, self._asking(u))
        return self._behind(outputs, memory[:, -1], before, (own[0], own[1]))

    def first(self, states: Sequence[DrafterState]) -> FalconPaths:
        memory, contexts, back = [], [], torch.arange(-self.heads_a_round, 0, device=self.device)
        for state in states:
            (keys, values), halves = (cache.storage[:, 0, :, : state.num_rows] for cache in state.caches)
            memory.append(halves[:, 0, (state.num_rows + back).clamp_min(0)].transpose(0, 1).flatten(1))
            contexts.append((keys, values))
        seen = torch.tensor([state.num_rows for state in states], device=self.device)
        before = Contexts(contexts, torch.arange(len(states), device=self.device), seen)
        blocks = torch.stack(memory)
        x, layer = self._asking(blocks[..., : self.spec.hidden_size]), self.stage.layer
        queries = layer.attention.queries(layer.attention_norm(x), self._rotary(seen[:, None] + back))
        outputs = looked_up(layer, x, queries, self._none(x), before)
        return self._behind(outputs, blocks[:, -1], before)

    # -- training form: every row ends a block ------------------------------------------------------------------------

    def first_along(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> FalconPaths:
        number, length = next_ids.shape
        memory = self._mixed(self.fused(hidden, next_ids), hidden.new_zeros(number, self._memory_size))
        kept = self._keys_values(memory, torch.arange(length, device=hidden.device)[None])
        before = Contexts(list(zip(*kept, strict=True)), select // length, select % length + 1)
        u = memory[..., : self.spec.hidden_size]
        outputs = torch.stack([self._slot(slot, u, kept, select) for slot in range(self.heads_a_round)], dim=1)
        if self.training and self._share > 0 and self.heads_a_round > 1:
            outputs = self._glanced(outputs, u, next_ids, before)
        return self._behind(outputs, memory.flatten(0, 1).index_select(0, select), before)

    def _slot(self, slot: int, u: Tensor, kept: tuple[Tensor, Tensor], select: Tensor) -> Tensor:
        """g [P, D] of one slot of the blocks that end at flat rows [P], from u [B, T, D]."""
        layer = self.stage.layer
        places = torch.arange(u.shape[1], device=u.device) - (self.heads_a_round - 1 - slot)
        x = u[:, places.clamp_min(0)] if self.slot_positions is None else u + self.slot_positions[slot]
        queries = layer.attention.queries(layer.attention_norm(x), self._rotary(places[None]))
        mixed = mix(queries, *kept, None, is_causal=True).transpose(1, 2).flatten(2)
        x, mixed = (rows.flatten(0, 1).index_select(0, select) for rows in (x, mixed))
        return layer.widened(x + layer.attention.output(mixed))

    def at_step(self, step: int, num_steps: int) -> None:
        self._step, self._share = step, self.config.glance_share * (1 - step / num_steps)

    def _glanced(self, outputs: Tensor, u: Tensor, next_ids: Tensor, before: Contexts) -> Tensor:
        """g [P, k, D], anew of the blocks in which an answer is shown. What is shown hangs on position, token and step
        alone, however a batch is split."""
        places = before.seen[:, None] + torch.arange(-self.heads_a_round, self.heads_a_round - 1, device=u.device)
        rows = before.owners[:, None] * u.shape[1] + places.clamp(0, u.shape[1] - 1)
        block, answers = rows.split([self.heads_a_round, self.heads_a_round - 1], dim=1)
        tokens, columns = next_ids.flatten()[answers], places[:, self.heads_a_round :]
        with torch.no_grad():
            best = self._token_ids(self.head_logits(self.output_norm(outputs[:, :-1])).argmax(-1))
        shown = (best != tokens) & (_chance(columns, tokens, self._step) < self._share) & (places[:, :1] >= 0)
        some = shown.any(-1).nonzero().squeeze(-1)
        if not len(some):
            return outputs
        block = torch.cat([torch.where(shown, answers, block[:, :-1]), block[:, -1:]], dim=1)[some]
        x = u.flatten(0, 1)[block]
        above = Contexts(before.rows, before.owners[some], before.seen[some] - self.heads_a_round)
        glanced, *_ = step(self.stage.layer, x, self._none(x), above, self._asking(x))
        return outputs.index_copy(0, some, glanced.to(outputs.dtype))

    # -- what is kept -------------------------------------------------------------------------------------------------

    @property
    def row_bytes(self) -> int:
        kept = 2 * self.spec.num_key_value_heads * self.spec.head_size + self._memory_size
        return kept * self.dtype.itemsize

    def start(self) -> DrafterState:
        return DrafterState(caches=[LayerCache(), LayerCache()])  # of the layer; of memory, in two halves

    def feed(self, state: DrafterState, hidden: Tensor, next_ids: Tensor) -> None:
        for cache in state.caches:
            cache.trim(state.num_rows)  # what a commit that was broken off has left
        of_layer, of_memory = state.caches
        memory = torch.zeros(1, self._memory_size, dtype=self.dtype, device=self.device)
        if state.num_rows:
            memory = of_memory.storage[:, 0, 0, state.num_rows - 1].reshape(1, -1)
        rows = self._mixed(self.fused(hidden.to(self.dtype)[None], next_ids[None]), memory)
        positions = torch.arange(state.num_rows, state.num_rows + len(hidden), device=hidden.device)[None]
        of_layer.append(*self._keys_values(rows, positions))
        of_memory.append(*rows[:, None].chunk(2, dim=-1))
        state.num_rows += len(hidden)


def _chance(*parts: Tensor | int) -> Tensor:
    """A number from 0 to 1 for each, which depends on nothing else."""
    mixed = torch.zeros((), dtype=torch.long)
    for part in (*parts, 0):
        mixed = (mixed ^ part) * -0x61C8864680B583EB
        mixed = mixed ^ (mixed >> 29)
    return (mixed & 0xFFFFFF) / float(1 << 24)
