"""HiddenStore: hidden states of token rows on disk, in float16, filled as they are computed.

A row is marked as stored only after its states are written: a killed run finds every marked row whole. Several
processes of one machine may share a store once one of them has made it; a row that two compute at once is written
twice, with states that differ by no more than rounding.

    FOLDER/store.json   of which rows and which target
    FOLDER/hidden.f16   [tokens of all rows, D]
    FOLDER/done.u1      one byte a row
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amphista.errors import ConfigError, DataError
from amphista.target.spec import Fingerprint
from amphista.train.rows import TokenRow

GIGABYTE = 1e9
SPARE_BYTES = 256 << 20  # left free on the disk: state, drafters and log go there, too


class HiddenStore:
    """Open or make the store of these rows; `about` says what it takes."""

    def __init__(self, folder: Path, rows: Sequence[TokenRow], fingerprint: Fingerprint) -> None:
        """raises DataError for ids that are not distinct, ConfigError where the disk has no room for the store."""
        lengths = [len(row.token_ids) for row in rows]
        self._offsets = dict(zip((row.id for row in rows), np.cumsum([0, *lengths[:-1]]).tolist(), strict=True))
        self._index = {row.id: i for i, row in enumerate(rows)}
        if len(self._index) != len(rows):
            raise DataError("two rows carry the same id: the hidden-state store needs distinct ids")
        shape = (sum(lengths), fingerprint.hidden_size)
        self.about = _make_room(folder, 2 * shape[0] * shape[1], len(rows))
        tokens = hashlib.sha256(json.dumps([(row.id, row.token_ids) for row in rows]).encode()).hexdigest()
        identity = {"tokens_sha256": tokens, "lm_head_sha256": fingerprint.lm_head_sha256}
        _claim(folder, identity, shape)
        self._hidden = _open_map(folder / "hidden.f16", np.float16, shape)
        self._done = _open_map(folder / "done.u1", np.uint8, (len(rows),))

    def has(self, row: TokenRow) -> bool:
        return bool(self._done[self._index[row.id]])

    def get(self, row: TokenRow) -> Tensor:
        """Hidden states [T, D], float32."""
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
        start = self._offsets[row.id]
        return self._hidden[start : start + len(row.token_ids)]


def _make_room(folder: Path, num_bytes: int, num_rows: int) -> str:
    """What the store takes, in words; raises ConfigError where the disk lacks room for what is not yet written."""
    folder.mkdir(parents=True, exist_ok=True)
    states = folder / "hidden.f16"
    written = states.stat().st_blocks * 512 if states.is_file() else 0  # the file has holes until it is filled
    free = shutil.disk_usage(folder).free
    about = f"hidden states of {num_rows} rows take {num_bytes / GIGABYTE:.2f} GB in {folder}"
    if num_bytes - written + SPARE_BYTES > free:
        raise ConfigError(
            f"{about}, where {free / GIGABYTE:.2f} GB are free: make room, give --out on another disk, "
            "or train with data.store=false"
        )
    return f"{about} ({free / GIGABYTE:.2f} GB free, {written / GIGABYTE:.2f} GB of it written before)"


def _claim(folder: Path, identity: dict[str, str], shape: tuple[int, int]) -> None:
    """Forget what is marked there if it belongs to other rows, another target, or to states that are gone."""
    described = folder / "store.json"
    is_ours = described.is_file() and json.loads(described.read_text()) == identity
    if not is_ours or not _has_size(folder / "hidden.f16", np.float16, shape):
        (folder / "done.u1").unlink(missing_ok=True)  # marks without states would train on zeros
    if not is_ours:
        fresh = folder / "store.json.new"
        fresh.write_text(json.dumps(identity))
        fresh.replace(described)


def _open_map(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    return np.memmap(path, dtype=dtype, mode="r+" if _has_size(path, dtype, shape) else "w+", shape=shape)


def _has_size(path: Path, dtype: type, shape: tuple[int, ...]) -> bool:
    return path.is_file() and path.stat().st_size == int(np.prod(shape)) * np.dtype(dtype).itemsize
