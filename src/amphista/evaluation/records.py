"""Records: one JSON line per question x turn x method x repeat, and the run they belong to.

A run folder holds `run.json` (settings and environment, once) and `records.jsonl`. Records are written in groups, all
methods of one turn at a time, so that a killed run leaves whole groups and at most one torn one, which is measured
again: methods are only ever compared within a group. A crash is a record with an `error`, never a number.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amphista.config import build
from amphista.errors import ConfigError, DataError
from amphista.files import write_file

RETIRED = ("recount", "num_dropped")  # Spec-Bench's counting, in records of earlier versions
Group = tuple[int, str, int]  # repeat, question id, turn


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answer by one method. Times are wall seconds; lists hold one entry per decode step of the target.

    seconds: prefill and decoding, without loading and tokenising. prefill_tokens: tokens that came out of the prefill
    forward (1, or more where a method drafts into the prefill). expected: draft tokens that should be accepted by the
    drafter's own probabilities. drafted: 1 where heads were asked, 0 where not. divergence: where the answer first
    differs from the one of `none` to the same prompt. matches: whether it is the same, False for a failed answer where
    `none` gave one; None where the two cannot be compared.
    """

    id: str
    category: str
    task: str
    turn: int
    repeat: int
    method: str
    seed: int
    error: str | None = None
    num_prompt_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    tree_nodes: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    prefill_tokens: int = 1
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    finish_reason: str | None = None
    matches: bool | None = None
    divergence: dict[str, Any] | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None

    @property
    def group(self) -> Group:
        """What is measured, and written, together."""
        return self.repeat, self.id, self.turn

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.prefill_seconds


def read_records(path: Path) -> list[Record]:
    """Every record of a finished file; raises DataError naming the first damaged line."""
    records, torn = _read(path)
    if torn:
        raise DataError(f"{path} ends in the middle of a record: the run was broken off; run its command again")
    return records


def read_groups(path: Path, methods: Sequence[str]) -> list[Record]:
    """The records of all whole groups of a file that a killed run may have left; a torn tail is left out.

    raises DataError for a line damaged elsewhere than at the end, and for groups a killed run cannot leave.
    """
    records, _ = _read(path)
    groups: dict[Group, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    whole = []
    for index, (group, members) in enumerate(groups.items()):
        if [member.method for member in members] == list(methods):
            whole += members
        elif index + 1 < len(groups):
            raise DataError(
                f"{path}: question {group[1]}, turn {group[2]} has records of {[m.method for m in members]}, expected "
                f"{list(methods)}: the file was edited or written by two runs at once; give another --out"
            )
    return whole


def _read(path: Path) -> tuple[list[Record], bool]:
    """Records, and whether the last line is torn (it lacks its newline)."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    lines = content.split(b"\n")
    torn = lines.pop() != b""
    return [_parse(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)], torn


def _parse(line: bytes, where: str) -> Record:
    try:
        return build(Record, {key: value for key, value in json.loads(line).items() if key not in RETIRED})
    except (ValueError, ConfigError, AttributeError) as error:
        raise DataError(f"{where} is no record: {error}") from error


class RecordFile:
    """Appends groups to `records.jsonl`; each is on disk before the next one is measured."""

    def __init__(self, path: Path, kept: Sequence[Record] = ()) -> None:
        """Keep `kept` (whole groups of an earlier run) and cut off what a kill has left behind them."""
        self._path = path
        write_file(path, "".join(map(_line, kept)))

    def append(self, group: Sequence[Record]) -> None:
        """Write one group in one piece."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write("".join(map(_line, group)))
            stream.flush()
            os.fsync(stream.fileno())


def _line(record: Record) -> str:
    """Only what differs from the defaults: failed records and plain steps stay short."""
    values = {key: value for key, value in dataclasses.asdict(record).items() if value != _DEFAULTS.get(key, ...)}
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


_DEFAULTS = {
    f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    for f in dataclasses.fields(Record)
    if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
}
