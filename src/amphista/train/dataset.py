"""Token rows -> batches with the target's hidden states, deterministic and resumable.

Hidden states come from the frozen target in process. With a store they are computed once, on first use, and kept on
disk in float16 (2 bytes x hidden size a token: 1.2 kB for the default target).

Shapes: B rows, T tokens, D hidden size, Q answer rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amphista.errors import DataError
from amphista.target.target import Target
from amphista.train.losses import AnswerRows
from amphista.train.rows import TokenRow

BUCKET_BATCHES = 32  # rows of this many batches are sorted by length together


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: hidden [B, T, D], next ids [B, T] (the last column repeats), and the answers' rows."""

    hidden: Tensor
    next_ids: Tensor
    answer_rows: AnswerRows

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on another device; the signature `accelerate` calls."""
        rows = self.answer_rows
        moved = AnswerRows(rows.rows.to(device), rows.next_ids.to(device), rows.answers.to(device))
        return Batch(self.hidden.to(device), self.next_ids.to(device), moved)


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
    return training, validation


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
    """Hidden states of rows, straight from the target or through a store on disk.

    A row is marked as stored only after its states are written: a killed run finds every marked row whole.
    """

    def __init__(self, target: Target, rows: Sequence[TokenRow], folder: Path | None) -> None:
        self._target, self._folder = target, folder
        if folder is None:
            return
        lengths = [len(row.token_ids) for row in rows]
        self._offsets = dict(zip((row.id for row in rows), np.cumsum([0, *lengths[:-1]]).tolist(), strict=True))
        self._index = {row.id: i for i, row in enumerate(rows)}
        if len(self._index) != len(rows):
            raise DataError("two rows carry the same id: the hidden-state store needs distinct ids")
        tokens = hashlib.sha256(json.dumps([(row.id, row.token_ids) for row in rows]).encode()).hexdigest()
        identity = {"tokens_sha256": tokens, "lm_head_sha256": target.fingerprint.lm_head_sha256}
        folder.mkdir(parents=True, exist_ok=True)
        described = folder / "store.json"
        if described.is_file() and json.loads(described.read_text()) != identity:
            (folder / "done.u1").unlink(missing_ok=True)
        described.write_text(json.dumps(identity))
        shape = (sum(lengths), target.spec.hidden_size)
        if not _has_size(folder / "hidden.f16", np.float16, shape):
            (folder / "done.u1").unlink(missing_ok=True)  # marks without states would train on zeros
        self._hidden = _open_map(folder / "hidden.f16", np.float16, shape)
        self._done = _open_map(folder / "done.u1", np.uint8, (len(rows),))

    def get(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        """Hidden states [T, D] of each row, float32."""
        if self._folder is None:
            return self._compute(rows)
        missing = [row for row in rows if not self._done[self._index[row.id]]]
        for row, hidden in zip(missing, self._compute(missing), strict=True):
            self._span(row)[:] = hidden.to(torch.float16).cpu().numpy()
            self._done[self._index[row.id]] = 1
        return [torch.from_numpy(self._span(row).astype(np.float32)) for row in rows]

    def _span(self, row: TokenRow) -> np.ndarray:
        start = self._offsets[row.id]
        return self._hidden[start : start + len(row.token_ids)]

    def _compute(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        if not rows:
            return []
        ids = _pad([row.token_ids for row in rows]).to(self._target.device)
        with torch.autocast(ids.device.type, enabled=False):  # the target keeps its own precision, whoever asks
            hidden = self._target.hidden_states(ids).float().clone()
        return [hidden[i, : len(row.token_ids)] for i, row in enumerate(rows)]


def _open_map(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    return np.memmap(path, dtype=dtype, mode="r+" if _has_size(path, dtype, shape) else "w+", shape=shape)


def _has_size(path: Path, dtype: type, shape: tuple[int, ...]) -> bool:
    return path.is_file() and path.stat().st_size == int(np.prod(shape)) * np.dtype(dtype).itemsize


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


def collate(rows: Sequence[TokenRow], hidden: Sequence[Tensor]) -> Batch:
    """Pad rows to one length and list the rows h_t whose next token x_{t+1} lies in an answer."""
    ids = _pad([row.token_ids for row in rows])
    next_ids = torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)
    length = ids.shape[1]
    flat, answers = [], []
    for b, row in enumerate(rows):
        for t in range(len(row.token_ids) - 1):
            if row.answers[t + 1]:
                flat.append(b * length + t)
                answers.append(b * 10000 + row.answers[t + 1])
    index = torch.tensor(flat, dtype=torch.long)
    padded = torch.nn.utils.rnn.pad_sequence(list(hidden), batch_first=True)
    return Batch(
        padded, next_ids, AnswerRows(index, next_ids.flatten()[index], torch.tensor(answers, dtype=torch.long))
    )


def _pad(ids: Sequence[Sequence[int]]) -> Tensor:
    longest = max(len(row) for row in ids)
    return torch.tensor([list(row) + [row[-1]] * (longest - len(row)) for row in ids])


def batches_of(
    rows: Sequence[TokenRow], hidden: HiddenStates, batch_size: int
) -> Iterator[tuple[list[TokenRow], Batch]]:
    """Batches in length order, for validation."""
    by_length = sorted(rows, key=lambda row: len(row.token_ids))
    for start in range(0, len(by_length), batch_size):
        some = by_length[start : start + batch_size]
        yield some, collate(some, hidden.get(some))
