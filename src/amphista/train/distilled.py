"""Distilled answers on disk: one JSON line a finished conversation, appended as it ends.

DIR/run.json               settings, prompts, chat template, target, provenance
DIR/rows-<process>.jsonl   {"id", "tokens": [[token ids, [[first, behind the last], ...]], ...],
                            "temperature"?, "finish"?, "skipped"?}

`tokens` are the conversation's rows (several where the chat template rewrites history): their token ids, and where
among them the answers lie. A line is written before the next conversation ends: a kill loses none (a power cut: at most
the last 5 seconds). A last line cut short counts for nothing: its conversation is answered again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

from amphista.errors import DataError
from amphista.files import Lock, check_same_run, read_json, write_json
from amphista.target.spec import Fingerprint
from amphista.train.token_row import TokenRow, group_of

RUN = "run.json"
SYNC_SECONDS = 5.0


@dataclass(frozen=True)
class Answered:
    """One conversation the target has answered.

    rows: one, or more where the chat template rewrites history, or none where it was `skipped` (the reason why).
    finish: why each of its answers ended.
    """

    id: str
    rows: tuple[TokenRow, ...] = ()
    finish: tuple[str, ...] = ()
    skipped: str | None = None

    @property
    def num_answer_tokens(self) -> int:
        return sum(row.num_answer_tokens for row in self.rows)

    @property
    def temperature(self) -> float | None:
        """What its answers were sampled at; None where there are none."""
        return self.rows[0].temperature if self.rows else None

    def line(self) -> bytes:
        """As it stands in a file, line end included."""
        record: dict[str, Any] = {"id": self.id}
        if self.rows:
            record |= {"temperature": self.temperature, "finish": self.finish}
        if self.skipped is not None:
            record["skipped"] = self.skipped
        record["tokens"] = [[row.token_ids, answer_spans(row.answers)] for row in self.rows]
        return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def token_rows(name: str, rows: Sequence[tuple[list[int], list[int]]], temperature: float | None) -> list[TokenRow]:
    """The rows (token ids, answer numbers) of one conversation under their ids: `name`, `name/1`, ..."""
    return [
        TokenRow(f"{name}/{i}" if i else name, group_of(name), ids, answers, temperature)
        for i, (ids, answers) in enumerate(rows)
    ]


def answer_spans(answers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, behind the last) of each run of equal answer numbers, 0 left out."""
    spans, at = [], 0
    for number, run in groupby(answers):
        end = at + sum(1 for _ in run)
        if number:
            spans.append((at, end))
        at = end
    return spans


def answer_numbers(spans: Sequence[Sequence[int]], length: int) -> list[int]:
    """For each token of a row the number of its answer, from 1; 0 outside."""
    numbers = [0] * length
    for number, (start, end) in enumerate(spans, start=1):
        numbers[start:end] = [number] * (end - start)
    return numbers


# -- reading ----------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> dict[str, Any]:
    """`run.json` of a distillation; raises DataError where there is none."""
    if not (folder / RUN).is_file():
        raise DataError(f"the folder {folder} holds no {RUN}: expected one written by `amphista distill`")
    run = read_json(folder / RUN)
    if "identity" not in run:
        raise DataError(f"{folder / RUN} does not describe a distillation: expected one written by `amphista distill`")
    return run


def read_answered(folder: Path, process: int | None = None) -> list[Answered]:
    """Every finished conversation of a folder (or of one process), by id; also while the run goes on."""
    paths = sorted(folder.glob(f"rows-{'*' if process is None else process}.jsonl"))
    return sorted((one for path in paths for one in _read_lines(path)), key=lambda one: one.id)


def read_folder(folder: Path, fingerprint: Fingerprint | None = None) -> list[TokenRow]:
    """All rows of a folder, in the order of their ids; raises DataError when it was made with another tokenizer."""
    run = read_run(folder)
    if fingerprint is not None:
        made_by = run["identity"].get("target", {})
        if any(made_by.get(name) != getattr(fingerprint, name) for name in ("vocab_size", "tokenizer_sha256")):
            raise DataError(
                f"{folder} was distilled from {run.get('target')}, whose tokenizer is not this target's: distill the "
                "prompts again with this target"
            )
    return [row for answered in read_answered(folder) for row in answered.rows]


def _read_lines(path: Path) -> Iterator[Answered]:
    """The whole lines of a file; one cut short at its end is left out."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                tokens = [(ids, answer_numbers(spans, len(ids))) for ids, spans in record["tokens"]]
                rows = token_rows(record["id"], tokens, record.get("temperature"))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path} line {number} is damaged ({error!r}): delete the line") from error
            yield Answered(record["id"], tuple(rows), tuple(record.get("finish", ())), record.get("skipped"))


# -- writing ----------------------------------------------------------------------------------------------------------


class AnswerFile:
    """One process's file of a distillation. Use as a context manager; `done` are the ids that stand in it."""

    def __init__(self, folder: Path, process: int, run: dict[str, Any]) -> None:
        """Open or resume. run: what `run.json` is to hold; its `identity` must be that of a run already there.

        raises ConfigError when it is another run's folder, or when the same process runs twice.
        """
        with Lock(folder / ".lock", f"another process is opening {folder}", wait=True):
            if not (folder / RUN).exists():
                write_json(folder / RUN, run)
            check_same_run(f"{folder} holds another distillation", read_run(folder)["identity"], run["identity"])
        path = folder / f"rows-{process}.jsonl"
        self._lock = Lock(
            folder / f".lock-{process}",
            f"another process is distilling into {path}: wait for its end or give another --out",
        )
        try:
            self.done = {one.id for one in _read_lines(path)} if path.exists() else set()
        except BaseException:
            self._lock.release()
            raise
        self._stream = path.open("ab")
        self._stream.truncate(path.read_bytes().rfind(b"\n") + 1)  # a line cut short
        self._synced = time.monotonic()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stream.close()  # writes what is left, for which there may be no room
        finally:
            self._lock.release()

    def add(self, answered: Answered) -> None:
        """Keep a finished conversation."""
        assert answered.id not in self.done
        self._stream.write(answered.line())
        self._stream.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()
        self.done.add(answered.id)
