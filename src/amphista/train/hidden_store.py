"""HiddenStore: hidden states of token rows on disk, in float16, filled as they are computed.

    FOLDER/<identity>/store.json   of which rows, target (its type included) and taps
    FOLDER/<identity>/hidden.f16   [tokens of all rows, W = (1 + taps) D], by row id
    FOLDER/<identity>/done.u1      one byte a row

<identity> is a hash of store.json: runs of the same rows, target and taps share a store, others have their own, and
none ever changes the size of a file that another may have open. A row is marked as stored only after its states are
written, so a killed run leaves nothing that is believed. A row that two processes compute at once is written twice,
with states that differ by no more than rounding.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amphista.errors import ConfigError, DataError
from amphista.files import Lock, new_folder, replace_folder, write_json
from amphista.target.hidden_states import Taps
from amphista.train.token_row import TokenRow

GIGABYTE = 1e9
SPARE_BYTES = 256 << 20  # left free on the disk: state, drafters and log go there, too


class HiddenStore:
    """Open or make the store of these rows; `about` says what it takes."""

    def __init__(self, folder: Path, rows: Sequence[TokenRow], target: dict[str, Any], taps: Taps = ()) -> None:
        """target: its `identity`. raises DataError for ids that are not distinct, ConfigError for a disk too full."""
        by_id = {row.id: row for row in rows}
        if len(by_id) != len(rows):
            raise DataError("two rows carry the same id: the hidden-state store needs distinct ids")
        names = sorted(by_id)
        lengths = [len(by_id[name].token_ids) for name in names]
        self._index = {name: i for i, name in enumerate(names)}
        self._offsets = np.cumsum([0, *lengths]).tolist()
        tokens = hashlib.sha256()
        for name in names:
            tokens.update(json.dumps([name, by_id[name].token_ids]).encode())
        identity = {"tokens_sha256": tokens.hexdigest(), "target": target, **({"taps": taps} if taps else {})}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = folder / digest[:24]
        shape = (sum(lengths), (1 + len(taps)) * target["hidden_size"])
        with Lock(folder / ".lock", f"another process is making a store in {folder}", wait=True):
            self.about = _make_room(self.folder, 2 * shape[0] * shape[1], len(rows))
            if not _is_whole(self.folder, shape, len(rows)):
                _make(self.folder, identity, shape, len(rows))
        self._hidden = np.memmap(self.folder / "hidden.f16", dtype=np.float16, mode="r+", shape=shape)
        self._done = np.memmap(self.folder / "done.u1", dtype=np.uint8, mode="r+", shape=(len(rows),))

    def has(self, row: TokenRow) -> bool:
        return bool(self._done[self._index[row.id]])

    def get(self, row: TokenRow) -> Tensor:
        """Hidden states [T, W], float32."""
        return torch.from_numpy(self._span(row).astype(np.float32))

    def put(self, row: TokenRow, hidden: Tensor) -> None:
        """raises DataError for states that float16 cannot hold."""
        narrow = hidden.to(torch.float16)
        if not torch.isfinite(narrow).all():
            raise DataError(
                f"row {row.id!r} has hidden states up to {float(hidden.abs().max()):.3g}, more than float16 holds: "
                "train with data.store=false"
            )
        self._span(row)[:] = narrow.cpu().numpy()
        self._done[self._index[row.id]] = 1

    def _span(self, row: TokenRow) -> np.ndarray:
        index = self._index[row.id]
        return self._hidden[self._offsets[index] : self._offsets[index + 1]]


def _make_room(folder: Path, num_bytes: int, num_rows: int) -> str:
    """What the store takes, in words; raises ConfigError where the disk lacks room for what is not yet written."""
    written = _bytes_in(folder)
    others = sum(_bytes_in(other) for other in folder.parent.glob("*/") if other != folder)
    free = shutil.disk_usage(folder.parent).free
    about = f"hidden states of {num_rows} rows take {num_bytes / GIGABYTE:.2f} GB in {folder}"
    beside = f"{others / GIGABYTE:.2f} GB are in stores of other rows or targets beside it" if others else ""
    if num_bytes - written + SPARE_BYTES > free:
        raise ConfigError(
            f"{about}, where {free / GIGABYTE:.2f} GB are free: make room{f' ({beside})' if beside else ''}, "
            "give --out on another disk, or train with data.store=false"
        )
    written_before = f"{written / GIGABYTE:.2f} GB of it written before"
    return f"{about} ({free / GIGABYTE:.2f} GB free, {written_before}{f'; {beside}' if beside else ''})"


def _bytes_in(folder: Path) -> int:
    """What the states in a store take on the disk: the file has holes until it is filled."""
    states = folder / "hidden.f16"
    return getattr(states.stat(), "st_blocks", 0) * 512 if states.is_file() else 0


def _is_whole(folder: Path, shape: tuple[int, int], num_rows: int) -> bool:
    """Whether both files are there in their sizes: marks without states would train on zeros."""
    sizes = {"hidden.f16": 2 * shape[0] * shape[1], "done.u1": num_rows}
    return all((folder / n).is_file() and (folder / n).stat().st_size == size for n, size in sizes.items())


def _make(folder: Path, identity: dict[str, Any], shape: tuple[int, int], num_rows: int) -> None:
    """Put an empty store there, whole; one that lacks a file is replaced, and who has that open keeps it."""
    fresh = new_folder(folder)
    write_json(fresh / "store.json", identity)
    np.memmap(fresh / "hidden.f16", dtype=np.float16, mode="w+", shape=shape).flush()
    np.memmap(fresh / "done.u1", dtype=np.uint8, mode="w+", shape=(num_rows,)).flush()
    replace_folder(fresh, folder)
