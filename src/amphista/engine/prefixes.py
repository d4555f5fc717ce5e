"""Prefix store: cached rows of earlier requests, found by the tokens they were made from.

Finished caches stay within a byte budget, least recently used first to go. They are found by chained hashes of blocks
of 32 tokens, then compared token by token, so that a collision costs a miss and never a wrong row. What is stored is
opaque: nothing here touches a tensor.

Law: a match never names more rows than were made of the prompt's own first tokens, nor rows of another namespace.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from amphista.errors import CapacityError

BLOCK = 32  # tokens


class CachedRows(Protocol):
    """Rows of a target's and a drafter's caches; row i was made of tokens 0..i, in the drafter of token i + 1, too."""

    @property
    def token_ids(self) -> list[int]: ...  # at least one a row
    @property
    def num_rows(self) -> int: ...  # committed, in target and drafter
    @property
    def num_bytes(self) -> int: ...  # allocated


@dataclass(frozen=True)
class Match:
    """A prompt can begin with the first `num_rows` of `rows`: copied, or else moved out of the store."""

    rows: CachedRows
    num_rows: int
    is_copy: bool


@dataclass(frozen=True, eq=False)
class _Entry:
    namespace: Hashable
    rows: CachedRows
    blocks: list[int]
    num_bytes: int
    is_kept: bool  # else a running request owns the rows, and their bytes are counted there


class PrefixStore:
    """Rows kept of finished requests, and rows shared by running ones."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0  # of kept rows
        self._entries: dict[int, _Entry] = {}  # by identity of the rows, least recently used first
        self._by_block: dict[tuple[Hashable, int], list[_Entry]] = {}

    def keep(self, namespace: Hashable, rows: CachedRows) -> bool:
        """Take over the rows of a finished request; False where they are too few to be found, or too large."""
        if rows.num_rows < BLOCK or rows.num_bytes > self.max_bytes:
            return False
        while self.num_bytes + rows.num_bytes > self.max_bytes:
            self.drop_oldest()
        self._add(namespace, rows, is_kept=True)
        return True

    def share(self, namespace: Hashable, rows: CachedRows) -> None:
        """Let the rows of a running request be found, too, until `forget`."""
        self._add(namespace, rows, is_kept=False)

    def forget(self, rows: CachedRows) -> None:
        """Take rows out, kept or shared; nothing happens where they are not in the store."""
        entry = self._entries.pop(id(rows), None)
        if entry is None:
            return
        self.num_bytes -= entry.num_bytes
        for block in entry.blocks:
            others = self._by_block[entry.namespace, block]
            others.remove(entry)
            if not others:
                del self._by_block[entry.namespace, block]

    def find(self, namespace: Hashable, token_ids: list[int]) -> Match | None:
        """The rows that share the longest prefix with a prompt, if that is a block at least; they stay in the store.

        With P tokens shared, P - 1 rows can be used: row P - 1 of a drafter was made with a next token that may now be
        another, and the last token of a prompt is always read. Kept rows of which less than a block would be lost are
        those of the turn before: to be moved. Others are to be copied.
        """
        found: list[_Entry] = []
        for block in _chained_hashes(token_ids):
            if (namespace, block) not in self._by_block:
                break
            found = self._by_block[namespace, block]
        ranked = [(_num_common(entry.rows, token_ids), entry.is_kept, -entry.rows.num_rows, entry) for entry in found]
        num_common, is_kept, _, entry = max(ranked, key=lambda rank: rank[:3], default=(0, False, 0, None))
        if entry is None or num_common < BLOCK:
            return None
        self._entries[id(entry.rows)] = self._entries.pop(id(entry.rows))  # used just now
        is_copy = not is_kept or entry.rows.num_rows - num_common >= BLOCK
        return Match(entry.rows, num_common - 1, is_copy)

    def drop_oldest(self) -> CachedRows:
        """Drop the kept rows that were not used for the longest time; something must be kept."""
        rows = next(entry.rows for entry in self._entries.values() if entry.is_kept)
        self.forget(rows)
        return rows

    def check_integrity(self) -> None:
        """Raise CapacityError when bytes, entries and blocks disagree."""
        num_bytes = sum(entry.num_bytes for entry in self._entries.values())
        num_blocks = sum(len(entry.blocks) for entry in self._entries.values())
        if not num_bytes == self.num_bytes <= self.max_bytes or num_blocks != sum(map(len, self._by_block.values())):
            raise CapacityError(f"prefix store: {self.num_bytes} bytes counted, {num_bytes} of {self.max_bytes} kept")

    def _add(self, namespace: Hashable, rows: CachedRows, is_kept: bool) -> None:
        blocks = _chained_hashes(rows.token_ids[: rows.num_rows])
        entry = _Entry(namespace, rows, blocks, rows.num_bytes if is_kept else 0, is_kept)
        self._entries[id(rows)] = entry
        self.num_bytes += entry.num_bytes
        for block in blocks:
            self._by_block.setdefault((namespace, block), []).append(entry)


def taken_over(rows: CachedRows, token_ids: list[int]) -> Match:
    """What a prompt can begin with of the rows of one sequence, which no one else goes on with."""
    return Match(rows, max(0, _num_common(rows, token_ids) - 1), is_copy=False)


def _chained_hashes(token_ids: list[int]) -> list[int]:
    """One for each whole block: of its tokens and of all before."""
    hashes = [0]
    for start in range(0, len(token_ids) - BLOCK + 1, BLOCK):
        hashes.append(hash((hashes[-1], *token_ids[start : start + BLOCK])))
    return hashes[1:]


def _num_common(rows: CachedRows, token_ids: list[int]) -> int:
    """How many tokens rows and prompt both begin with; whole blocks are compared at once."""
    mine, start = rows.token_ids, 0
    limit = min(rows.num_rows, len(token_ids))
    while start + BLOCK <= limit and mine[start : start + BLOCK] == token_ids[start : start + BLOCK]:
        start += BLOCK
    while start < limit and mine[start] == token_ids[start]:
        start += 1
    return start
