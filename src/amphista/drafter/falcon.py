"""Falcon (arXiv 2412.12639), semi-autoregressive: one layer that gives k tokens a pass and goes on from its own states.

    u_j      = F [n_g(h_j) ; n_E(E(x_{j+1}))]                                         rows j <= t, of the context
    g_{t+i}  = Layer(u_{t-k+i} at t-k+i | u_{<=t}),  i = 1..k                          first pass
    u_{t+i}  = F [n_g(g_{t+i}) ; n_E(E(x_{t+1+i}))];   t := t + k                      each further pass, drafted
    z_i      = LM(n_o(g_{t+i}))                                                       scores x_{t+1+i}

The k rows of a block see each other, whatever their order, the blocks above on their path, and the context. What stands
below the tokens of one block knows nothing of them but their depth. F is linear, as EAGLE's, or that with an LSTM on
top (`mixer`). With k = 1 this is EAGLE (a law).

Glancing (`glance_share`, the paper's coupled sequential glancing distillation): in training a first pass without
gradient tells which tokens of a block would be missed, and a share of these rows, the last one aside, reads the answer
in the place of its own input: u_{t+i}, of the target's state and token. The share falls to 0.

Certain, from the published code: k rows a pass under that mask, from states k positions before, and glancing by such
rows. Not to be had from there: F, an LSTM whose output cannot be used as written. Ours: F, norms, the start at LM(h),
taps as in `eagle.py`, glancing at every missed row by the same chance, objectives, training over all passes, and
`slots = "last"`, where all rows of a block start from its last one and a vector of their own.

Shapes: B sequences, T rows, P selected rows, n paths, i drafted rows of a path, k rows of a block, J key-value heads, S
rows of a context, E head size, D hidden size, W = (1 + taps) D, M numbers of memory: D, or 2 D with an LSTM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from amphista.drafter.base import MAX_HEADS, DrafterState, check_range
from amphista.drafter.eagle import EagleConfig, FusedHeads
from amphista.drafter.layers import LayerCache, rotary_tables
from amphista.drafter.path_rows import Contexts, step
from amphista.drafter.rounds import Paths
from amphista.errors import ConfigError
from amphista.target.spec import SharedWeights, TargetSpec

MIXERS, SLOTS = ("linear", "lstm"), ("previous", "last")


@dataclass(frozen=True, kw_only=True)
class FalconConfig(EagleConfig):
    """`num_heads` depths, `block_size` k of them a pass. `glance_share`: of the missed tokens, how many are shown in
    training at its start; it falls to 0 along the run."""

    block_size: int = 2
    mixer: Literal["linear", "lstm"] = "linear"
    slots: Literal["previous", "last"] = "previous"
    glance_share: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("block_size", self.block_size, 1, MAX_HEADS)
        if not 0 <= self.glance_share <= 1:
            raise ConfigError(f"glance_share is {self.glance_share}: expected a number from 0 to 1")
        for name, known in (("mixer", MIXERS), ("slots", SLOTS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(known)}")


class Text(NamedTuple):
    """What is trained on: memory of all rows [B, T, M], next ids [B, T]."""

    rows: Tensor
    next_ids: Tensor


@dataclass(frozen=True)
class FalconPaths(Paths):
    """`outputs` g [n, k, D] of the last pass and their states, `block` [n, k, D]; `read`, the tokens drafted since [n,
    0..k-1]; `memory` [n, M] of the last row; `owners` [n], ascending; `ends` [n], the position of each path's first own
    row; keys and values [n, J, i, E] of its own. contexts: keys, values [J, S, E] of each owner."""

    outputs: Tensor
    block: Tensor
    read: Tensor
    memory: Tensor
    owners: Tensor
    ends: Tensor
    keys: Tensor
    values: Tensor
    contexts: Sequence[tuple[Tensor, Tensor]]
    text: Text | None = None

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
        return torch.stack(found, dim=1)


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

    def _keys_values(self, memory: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, J, T, E] of rows of the context [B, T, M] at positions [1, T]."""
        layer, size = self.stage.layer, self.spec.hidden_size
        rotary = rotary_tables(positions, layer.sizes.head_size, layer.sizes.rope_theta)
        return layer.attention.keys_values(layer.attention_norm(memory[..., :size]), rotary)

    def _begun(
        self, blocks: Tensor, owners: Tensor, ends: Tensor, contexts: Sequence[tuple[Tensor, Tensor]], *text: Text
    ) -> FalconPaths:
        """Behind the first pass, over blocks of the context [n, k, M], the first row of each at `ends` [n]."""
        none = blocks.new_empty(len(blocks), self.spec.num_key_value_heads, 0, self.spec.head_size)
        unread = torch.empty(len(blocks), 0, dtype=torch.long, device=blocks.device)
        paths = FalconPaths(none, none, none, unread, none, owners, ends, none, none, contexts, *text)
        return self._passed(blocks, paths)

    def _passed(self, rows: Tensor, paths: FalconPaths) -> FalconPaths:
        """Behind a pass over a block more on each path, memory [n, k, M]."""
        if self.training and self._share > 0 and paths.text is not None:
            rows = self._glanced(rows, paths, paths.text)
        return self._of_layer(rows, paths)

    def _of_layer(self, rows: Tensor, paths: FalconPaths) -> FalconPaths:
        u = rows[..., : self.spec.hidden_size]
        asking = None if self.slot_positions is None else u[:, -1:] + self.slot_positions
        before = Contexts(paths.contexts, paths.owners, paths.ends.clamp_min(0), paths.ends)
        outputs, keys, values = step(self.stage.layer, u, (paths.keys, paths.values), before, asking)
        block, read = self.output_norm(outputs), paths.read[:, :0]
        paths = replace(paths, read=read, memory=rows[:, -1], keys=keys, values=values)
        return replace(paths, states=block[:, 0], outputs=outputs, block=block)

    def next(self, paths: FalconPaths, tokens: Tensor) -> FalconPaths:
        read = torch.cat([paths.read, tokens[:, None]], dim=1)
        if read.shape[1] < self.config.block_size:
            return replace(paths, states=paths.block[:, read.shape[1]], read=read)
        rows = self.stage.fused(paths.outputs, self._embedded(read))
        return self._passed(self._mixed(rows, paths.memory), paths)

    # -- glancing ------------------------------------------------------------------------------------------------------

    def at_step(self, step: int, num_steps: int) -> None:
        self._step, self._share = step, self.config.glance_share * (1 - step / num_steps)

    def _glanced(self, rows: Tensor, paths: FalconPaths, text: Text) -> Tensor:
        """Blocks [n, k, M], the answer's rows in the place of a share of those whose token would be missed. Which ones
        is told from the position, the token and the step, however a batch is split."""
        head, size = paths.keys.shape[2], self.config.block_size
        heads, length = slice(head, min(head + size - 1, self.num_heads)), text.next_ids.shape[1]
        ahead = torch.arange(size, size + heads.stop - heads.start, device=rows.device)
        columns = (paths.ends[:, None] + head + ahead).clamp_max(length - 1)
        index = paths.owners[:, None] * length + columns
        tokens, answers = text.next_ids.flatten()[index], text.rows.flatten(0, 1)[index]
        with torch.no_grad():
            logits = self._scores(self._of_layer(rows, paths), heads)
        is_shown = (self._token_ids(logits.argmax(-1)) != tokens) & (_chance(columns, tokens, self._step) < self._share)
        shown = torch.where(is_shown[..., None], answers, rows[:, : len(ahead)])
        return torch.cat([shown, rows[:, len(ahead) :]], dim=1)

    # -- rows of the context -------------------------------------------------------------------------------------------

    def first_along(self, hidden: Tensor, next_ids: Tensor, select: Tensor) -> FalconPaths:
        (number, length), size = next_ids.shape, self.config.block_size
        rows = self._mixed(self.fused(hidden, next_ids), hidden.new_zeros(number, self._memory_size))
        keys, values = self._keys_values(rows, torch.arange(length, device=hidden.device)[None])
        ends = select % length + 1 - size
        columns = (ends[:, None] + torch.arange(size, device=hidden.device)).clamp_min(0)
        blocks = rows.flatten(0, 1)[(select - select % length)[:, None] + columns]
        contexts = list(zip(keys, values, strict=True))
        return self._begun(blocks, select // length, ends, contexts, Text(rows, next_ids))

    def first(self, states: Sequence[DrafterState]) -> FalconPaths:
        size, blocks, contexts = self.config.block_size, [], []
        for state in states:
            (keys, values), (first, second) = (cache.storage[:, 0, :, : state.num_rows] for cache in state.caches)
            index = torch.arange(state.num_rows - size, state.num_rows, device=self.device).clamp_min(0)
            blocks.append(torch.cat([first[0, index], second[0, index]], dim=-1))
            contexts.append((keys, values))
        ends = torch.tensor([state.num_rows - size for state in states], device=self.device)
        return self._begun(torch.stack(blocks), torch.arange(len(states), device=self.device), ends, contexts)

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
