"""Slots: plain decoding of many sequences at once on a GPU, each in a place of its own of one recorded block of steps.

The engine asks the host about every token of every sequence; where hundreds decode plainly and nobody waits for a
single one, that takes longer than their forward. Here a block of steps runs without the host: each slot feeds its
token, attends to its own rows, chooses its next token and watches for loops; who has ended is seen at the block's end.

Law: a slot's tokens are those of its prompt alone, up to rounding, whatever lies in the others.

Shapes: B slots, R rows a slot has room for, T tokens of the longest prompt, J key-value heads, E head size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amphista.engine.loops import LONGEST_SPAN, TOKENS_TO_LOOP
from amphista.errors import CaptureError
from amphista.kernels import slot_kernels
from amphista.kernels.graph import Recorder
from amphista.target.attention import Layout
from amphista.target.lean import LeanModel

BLOCK = 16  # steps between two looks of the host: as many are wasted on an answer that has ended, at most
PROMPT_TOKENS = 1 << 16  # of prompts read at once, padding included


def has_slots(model: LeanModel | None) -> bool:
    """Whether slots can decode with this model: on CUDA with Triton, all rows seen, heads that the kernel can take."""
    return (
        model is not None
        and model.device.type == "cuda"
        and slot_kernels.has_triton()
        and model.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and model.sees_all
        and model.has_plain_scores
        and model.head_size in (16, 32, 64, 128)  # larger ones have not been tried
        and model.num_heads // model.num_key_value_heads <= slot_kernels.GROUP_ROWS
    )


@dataclass(frozen=True)
class Start:
    """What goes into a slot: a prompt, and how its answer is chosen (temperature 0: greedy)."""

    slot: int
    prompt_ids: list[int]
    temperature: float
    seed: int


class Slots:
    """`num_slots` places with room for `num_rows` rows each. What a slot holds before it is filled is noise."""

    def __init__(self, model: LeanModel, num_slots: int, num_rows: int) -> None:
        """raises torch.OutOfMemoryError where the device has no room for the rows."""
        self._model, self._last_row = model, num_rows - 1
        model.rotary.reserve(num_rows)
        shape, device = (num_slots, model.num_key_value_heads, num_rows, model.head_size), model.device
        self._caches = [
            (torch.zeros(shape, dtype=model.dtype, device=device), torch.zeros(shape, dtype=model.dtype, device=device))
            for _ in model.layers
        ]
        self._tokens, self._lengths, self._seeds = torch.zeros(3, num_slots, dtype=torch.int64, device=device)
        self._temperatures = torch.zeros(num_slots, device=device)
        self._before = torch.full((num_slots, LONGEST_SPAN), -1, dtype=torch.int64, device=device)  # the last one first
        self._runs = torch.zeros_like(self._before)  # by span: tokens in a row that equal the one a span before
        self._loops = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self._enough = torch.tensor(TOKENS_TO_LOOP[1:], device=device)
        self._fed = torch.zeros(BLOCK, num_slots, dtype=torch.int64, device=device)
        self._looped = torch.zeros(BLOCK, num_slots, dtype=torch.bool, device=device)
        self._replay: Callable[[], None] | None = None

    @torch.inference_mode()
    def fill(self, starts: Sequence[Start]) -> None:
        """Read prompts into their slots; their first tokens are chosen and not yet fed."""
        by_length = sorted(starts, key=lambda start: len(start.prompt_ids))
        first = 0
        while first < len(by_length):
            end = first + 1
            while end < len(by_length) and (end + 1 - first) * len(by_length[end].prompt_ids) <= PROMPT_TOKENS:
                end += 1
            self._read(by_length[first:end])
            first = end

    def _read(self, starts: Sequence[Start]) -> None:
        device, longest = self._model.device, len(starts[-1].prompt_ids)
        ids = [start.prompt_ids + [0] * (longest - len(start.prompt_ids)) for start in starts]
        numbers = [[s.slot, len(s.prompt_ids), (s.seed + 2**63) % 2**64 - 2**63] for s in starts]
        slots, lengths, seeds = torch.tensor(numbers).T.contiguous().to(device)
        temperatures = torch.tensor([start.temperature for start in starts], device=device)
        rows = [[_Prompts(*cache, slots)] for cache in self._caches]
        layout = Layout.causal(longest, device)
        hidden = self._model.states(torch.tensor(ids).to(device), layout, rows)
        logits = self._model.logits(hidden[torch.arange(len(starts), device=device), lengths - 1])
        self._tokens[slots] = slot_kernels.choose(logits, temperatures, seeds, lengths)
        self._lengths[slots], self._seeds[slots], self._temperatures[slots] = lengths, seeds, temperatures
        self._before[slots], self._runs[slots], self._loops[slots] = -1, 0, False

    @torch.inference_mode()
    def run_block(self) -> Callable[[], tuple[Any, Any]]:
        """BLOCK steps of every slot, queued. What it returns waits for them: the tokens fed, and whether the answer
        looped with them or before [BLOCK, B], arrays."""
        if self._replay is None:
            kept = [part.clone() for part in self._state]  # recording runs the block several times
            try:
                self._replay = Recorder(self._model.device).record(self._block)
            except CaptureError as error:
                warnings.warn(f"slots decode without a captured graph, slower: {error}", RuntimeWarning, stacklevel=2)
                self._replay = self._block
            for part, value in zip(self._state, kept, strict=True):
                part.copy_(value)
        self._replay()
        parts = [part.to("cpu", copy=True, non_blocking=True) for part in (self._fed, self._looped)]
        done = torch.cuda.Event() if self._fed.is_cuda else None
        if done is not None:
            done.record()

        def wait() -> tuple[Any, Any]:
            if done is not None:
                done.synchronize()
            return parts[0].numpy(), parts[1].numpy()

        return wait

    @property
    def _state(self) -> list[Tensor]:
        return [self._tokens, self._lengths, self._before, self._runs, self._loops]

    def _block(self) -> None:
        for step in range(BLOCK):
            self._watch()
            self._fed[step], self._looped[step] = self._tokens, self._loops
            hidden = self._model.step(self._tokens, self._lengths, self._mix, self._caches)
            self._lengths.add_(1).clamp_(max=self._last_row)
            logits = self._model.logits(hidden)
            self._tokens.copy_(slot_kernels.choose(logits, self._temperatures, self._seeds, self._lengths))

    def _mix(self, queries: Tensor, keys: Tensor, values: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        return slot_kernels.attend(queries, (keys, values), cache, self._lengths)

    def _watch(self) -> None:
        """`LoopWatch.push` of every slot's token."""
        equal = self._before == self._tokens[:, None]
        self._runs.add_(1).mul_(equal)
        self._loops |= (self._runs >= self._enough).any(1)
        self._before.copy_(torch.cat([self._tokens[:, None], self._before[:, :-1]], dim=1))


@dataclass(frozen=True)
class _Prompts:
    """One layer's cache while prompts are read: [n, J, T, E] go to the first rows of their slots."""

    keys: Tensor
    values: Tensor
    slots: Tensor

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        length = keys.shape[2]
        self.keys[self.slots, :, :length], self.values[self.slots, :, :length] = keys, values
        return keys, values
