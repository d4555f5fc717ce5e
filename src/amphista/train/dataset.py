"""Token rows -> batches with the target's hidden states, deterministic and resumable.

Hidden states, with the drafter's taps behind them, come from the frozen target in process. With a store
(`hidden_store.py`) they are computed once, on first use, and kept on disk in float16 (2 bytes x hidden size a token and
as many a tap: 1.2 kB for the default target).

Shapes: B rows, T tokens, W of a row of hidden states and taps, Q answer rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amphista.drafter.base import Drafter
from amphista.errors import DataError
from amphista.target.spec import Probes
from amphista.target.target import Target
from amphista.train.head_loss import AnswerRows
from amphista.train.hidden_store import HiddenStore
from amphista.train.token_row import TokenRow

ANSWERS_A_ROW = 10000  # numbers of one row's answers and the next one's never meet
BUCKET_BATCHES = 32  # rows of this many batches are sorted by length together


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded rows: hidden [B, T, W], next ids [B, T] (the last column repeats), and the answers' rows."""

    hidden: Tensor
    next_ids: Tensor
    answer_rows: AnswerRows

    def to(self, device: torch.device, non_blocking: bool = False) -> PaddedBatch:
        """The same batch on another device; the signature `accelerate` calls."""
        rows = self.answer_rows
        moved = AnswerRows(rows.rows.to(device), rows.next_ids.to(device), rows.answers.to(device))
        return PaddedBatch(self.hidden.to(device), self.next_ids.to(device), moved)


def split_rows(rows: Sequence[TokenRow], share: float, seed: int) -> tuple[list[TokenRow], list[TokenRow]]:
    """(training, validation) rows; answers to one prompt stay together, by hash of their group: stable as data grow."""

    def is_validation(row: TokenRow) -> bool:
        digest = hashlib.sha256(f"{seed}/{row.group}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < share

    validation = [row for row in rows if is_validation(row)]
    training = [row for row in rows if not is_validation(row)]
    if not training or not validation:
        raise DataError(
            f"{len(rows)} rows with a validation share of {share} leave {len(training)} to train on and "
            f"{len(validation)} to validate on: give more rows or another share"
        )
    check_measurable(validation)
    return training, validation


def check_measurable(rows: Sequence[TokenRow]) -> None:
    """Raise DataError where no head has anything to guess: the target itself chooses an answer's first token."""
    if not any(mark and mark == following for row in rows for mark, following in pairwise(row.answers)):
        raise DataError(
            f"none of the answers of {len(rows)} held-out rows has a second token, the first that a head can guess: "
            "give more rows or longer answers"
        )


def frequent_tokens(rows: Sequence[TokenRow], size: int, always: Sequence[int]) -> Tensor:
    """The `size` most frequent answer tokens, end tokens always included; unseen ties go to the lower id.

    Low ids are the early merges of a byte-pair vocabulary, which are its frequent ones.
    """
    counts = Counter(token for row in rows for token, mark in zip(row.token_ids, row.answers, strict=True) if mark)
    for token in always:
        counts[token] += 1 << 40
    seen = sorted(counts, key=lambda token: (-counts[token], token))[:size]
    chosen = set(seen)
    unseen = (token for token in range(1 << 30) if token not in chosen)
    return torch.tensor(sorted(seen + [next(unseen) for _ in range(size - len(seen))]))


def coverage(rows: Sequence[TokenRow], token_ids: Tensor | None) -> float:
    """Share of answer tokens inside a draft vocabulary."""
    if token_ids is None:
        return 1.0
    inside = set(token_ids.tolist())
    answer = [t for row in rows for t, mark in zip(row.token_ids, row.answers, strict=True) if mark]
    return sum(token in inside for token in answer) / len(answer)


class HiddenStates:
    """Hidden states of rows, straight from the target or through a store on disk; never NaN or infinite."""

    def __init__(
        self, target: Target, rows: Sequence[TokenRow], folder: Path | None, drafter: Drafter | None = None
    ) -> None:
        """folder: of the stores, or None; rows: all that will ever be asked for; drafter: whose taps, early layers and
        probes are read, too."""
        self._target, self._drafter = target, drafter
        self._taps = () if drafter is None else drafter.taps
        self.store = None if folder is None else HiddenStore(folder, rows, target.identity, self._taps)

    def get(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        """Hidden states [T, W] of each row, float32; raises DataError naming a row whose states are not finite.

        Of a drafter with probes, what the target gives for those below each row of an answer stands behind them, with
        a gradient where it is enabled.
        """
        found = self._compute(rows) if self.store is None else self._stored(self.store, rows)
        probes = None if self._drafter is None else self._drafter.probes
        if self._drafter is not None and self._drafter.num_early:
            early = self._forward(rows, partial(self._target.early_states, num_layers=self._drafter.num_early))
            found = [torch.cat(parts, dim=1) for parts in zip(found, early, strict=True)]
        return found if probes is None else [self._probed(*parts, probes) for parts in zip(rows, found, strict=True)]

    def _stored(self, store: HiddenStore, rows: Sequence[TokenRow]) -> list[Tensor]:
        missing = [row for row in rows if not store.has(row)]
        for row, hidden in zip(missing, self._compute(missing), strict=True):
            store.put(row, hidden)
        return [store.get(row) for row in rows]

    def _probed(self, row: TokenRow, hidden: Tensor, probes: Probes) -> Tensor:
        positions = torch.tensor([at - 1 for at, mark in enumerate(row.answers) if mark and at])
        states = self._target.probe_rows(row.token_ids, positions, probes).flatten(1).to(hidden)
        every = hidden.new_zeros(len(hidden), states.shape[1])
        return torch.cat([hidden, every.index_copy(0, positions.to(hidden.device), states)], dim=1)

    def _compute(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        return self._forward(rows, partial(self._target.hidden_states, taps=self._taps))

    def _forward(self, rows: Sequence[TokenRow], read: Callable[[Tensor], Tensor]) -> list[Tensor]:
        if not rows:
            return []
        ids = _padded_ids(rows).to(self._target.device)
        with torch.autocast(ids.device.type, enabled=False):  # the target keeps its own precision, whoever asks
            hidden = read(ids).float().clone()
        states = [hidden[i, : len(row.token_ids)] for i, row in enumerate(rows)]
        if torch.isfinite(hidden).all():  # asked once: a device answers when it has done everything else
            return states
        for row, state in zip(rows, states, strict=True):
            if not torch.isfinite(state).all():
                raise DataError(
                    f"row {row.id!r}: the target's hidden states hold NaN or infinity: leave the row out, or load the "
                    "target in float32"
                )
        return states


def epoch_batches(rows: Sequence[TokenRow], batch_size: int, seed: int, epoch: int) -> list[list[TokenRow]]:
    """The batches of one epoch: shuffled, near-equal lengths together, a function of seed and epoch alone."""
    order = np.random.default_rng([seed, epoch])
    shuffled = [rows[i] for i in order.permutation(len(rows))]
    bucket = batch_size * BUCKET_BATCHES
    batches = []
    for start in range(0, len(shuffled), bucket):
        by_length = sorted(shuffled[start : start + bucket], key=lambda row: len(row.token_ids))
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in order.permutation(len(batches))]


def part_of(rows: Sequence[TokenRow], index: int, count: int) -> list[TokenRow]:
    """Part `index` of `count` of a batch, which is sorted by length: every part gets short and long rows. May be []."""
    return list(rows[index::count])


def collate(rows: Sequence[TokenRow], hidden: Sequence[Tensor]) -> PaddedBatch:
    """Pad rows to one length and list the rows h_t whose next token x_{t+1} lies in an answer."""
    padded = torch.nn.utils.rnn.pad_sequence(list(hidden), batch_first=True)
    return PaddedBatch(padded, _next_ids(rows), answer_rows(rows))


def answer_rows(rows: Sequence[TokenRow]) -> AnswerRows:
    """The rows h_t of a padded batch whose next token x_{t+1} lies in an answer."""
    next_ids = _next_ids(rows)
    marks = torch.zeros_like(next_ids)
    for number, (of_row, row) in enumerate(zip(marks.numpy(), rows, strict=True)):
        answers = row.arrays[1, 1:]
        of_row[: len(answers)] = np.where(answers > 0, answers + number * ANSWERS_A_ROW, 0)
    index = marks.flatten().nonzero().squeeze(-1)
    return AnswerRows(index, next_ids.flatten()[index], marks.flatten()[index])


def idle_batch(width: int) -> PaddedBatch:
    """For a process that has no row of a batch: an answer of one token, at which no head aims. Its loss is 0."""
    token = torch.zeros(1, dtype=torch.long)
    return PaddedBatch(torch.zeros(1, 1, width), token[None], AnswerRows(token, token, token + 1))


def _next_ids(rows: Sequence[TokenRow]) -> Tensor:
    ids = _padded_ids(rows)
    return torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)


def _padded_ids(rows: Sequence[TokenRow]) -> Tensor:
    """[B, T], each row's last token repeated."""
    padded = np.empty((len(rows), max(len(row.token_ids) for row in rows)), dtype=np.int64)
    for to, row in zip(padded, rows, strict=True):
        to[: len(row.token_ids)] = row.arrays[0]
        to[len(row.token_ids) :] = row.token_ids[-1]
    return torch.from_numpy(padded)


def batches_of(rows: Sequence[TokenRow], hidden: HiddenStates, batch_size: int) -> Iterator[PaddedBatch]:
    """Batches in length order, for validation."""
    by_length = sorted(rows, key=lambda row: len(row.token_ids))
    for start in range(0, len(by_length), batch_size):
        some = by_length[start : start + batch_size]
        yield collate(some, hidden.get(some))
