"""Distilled rows on disk: token ids with their answers marked, in safetensors; no pickles.

DIR/run.json                         settings, prompts, chat template, target fingerprint, provenance
DIR/rows-<process>-<n>.safetensors   finished conversations, written whole or not at all
DIR/journal-<process>.jsonl          those not yet in a shard, one a line; a torn last line counts for nothing

A shard of R rows holds
    token_ids   uint16 or int32      all rows, one behind the other
    offsets     int64 [R + 1]        row r is token_ids[offsets[r] : offsets[r + 1]]
    answers     int32 [answers, 3]   row, first token, the token behind the last; counted from the row's start
and, as JSON in its metadata, what is not tokens: `conversations`, in the order of their rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from amphista.errors import DataError
from amphista.target.spec import Fingerprint
from amphista.train.rows import TokenRow, group_of

FORMAT = "amphista distilled rows 1"
RUN = "run.json"


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


def spans_of(marks: Sequence[int]) -> list[tuple[int, int]]:
    """(first, behind the last) of each run of equal answer numbers, 0 left out."""
    spans, at = [], 0
    for number, run in groupby(marks):
        end = at + sum(1 for _ in run)
        if number:
            spans.append((at, end))
        at = end
    return spans


def marks_of(spans: Sequence[Sequence[int]], length: int) -> list[int]:
    """Answer numbers of a row, counted from 1."""
    marks = [0] * length
    for number, (start, end) in enumerate(spans, start=1):
        marks[start:end] = [number] * (end - start)
    return marks


def _describe(answered: Answered) -> dict[str, Any]:
    """All but the tokens."""
    described: dict[str, Any] = {"id": answered.id, "rows": [row.id for row in answered.rows]}
    if answered.rows:
        described |= {"temperature": answered.temperature, "finish": list(answered.finish)}
    if answered.skipped is not None:
        described["skipped"] = answered.skipped
    return described


def _restore(described: dict[str, Any], tokens: Iterator[tuple[list[int], Sequence[Sequence[int]]]]) -> Answered:
    """The conversation a description and its rows' (token ids, answer spans) make up."""
    name = described["id"]
    rows = []
    for row_id in described["rows"]:
        ids, spans = next(tokens)
        rows.append(TokenRow(row_id, group_of(name), ids, marks_of(spans, len(ids)), described["temperature"]))
    return Answered(name, tuple(rows), tuple(described.get("finish", ())), described.get("skipped"))


# -- journal lines ----------------------------------------------------------------------------------------------------


def journal_line(answered: Answered) -> bytes:
    """One conversation, its line end included."""
    tokens = [[row.token_ids, spans_of(row.answers)] for row in answered.rows]
    record = {**_describe(answered), "tokens": tokens}
    return json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def read_journal(path: Path) -> tuple[list[Answered], int]:
    """The whole lines of a journal and their length in bytes; a torn last line is left out."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    found = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            found.append(_restore(record, iter(record["tokens"])))
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise DataError(
                f"{path} line {number} is damaged ({error!r}): delete the folder and distill again"
            ) from error
    return found, len(whole)


# -- shards -----------------------------------------------------------------------------------------------------------


def write_shard(path: Path, conversations: Sequence[Answered], vocab_size: int) -> None:
    """Write a shard whole or not at all."""
    rows = [row for answered in conversations for row in answered.rows]
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
    spans = [(index, *span) for index, row in enumerate(rows) for span in spans_of(row.answers)]
    tensors = {
        "token_ids": np.array([token for row in rows for token in row.token_ids], dtype=dtype),
        "offsets": np.cumsum([0, *(len(row.token_ids) for row in rows)], dtype=np.int64),
        "answers": np.array(spans, dtype=np.int32).reshape(-1, 3),
    }
    described = json.dumps([_describe(answered) for answered in conversations])
    replace_file(path, save(tensors, metadata={"format": FORMAT, "conversations": described}))


def shard_ids(path: Path) -> list[str]:
    """Ids of the conversations in a shard, without reading its tokens."""
    return [described["id"] for described in _open(path, tokens=False)[0]]


def read_shard(path: Path) -> list[Answered]:
    """The conversations of a shard; raises DataError when it is damaged or something else."""
    described, tensors = _open(path, tokens=True)
    ids, offsets, spans = (tensors[name].tolist() for name in ("token_ids", "offsets", "answers"))
    by_row: list[list[tuple[int, int]]] = [[] for _ in offsets[1:]]
    for row, start, end in spans:
        by_row[row].append((start, end))
    rows = ((ids[offsets[row] : offsets[row + 1]], by_row[row]) for row in range(len(by_row)))
    return [_restore(one, rows) for one in described]


def _open(path: Path, *, tokens: bool) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    try:
        with safe_open(path, framework="np") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise DataError(f"{path} is not a shard of distilled rows: its format is {metadata.get('format')!r}")
            described: list[dict[str, Any]] = json.loads(metadata["conversations"])
            return described, {name: stored.get_tensor(name) for name in stored.keys()} if tokens else {}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged or unreadable: {error}") from error


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in place with its content on disk: after a kill or a power cut it is the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put a folder's own entries on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- a whole folder ---------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> dict[str, Any]:
    """`run.json` of a distillation; raises DataError where there is none."""
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"the folder {folder} holds no {RUN}: expected one written by `amphista distill`") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {folder / RUN}: {error}") from error
    if not isinstance(run, dict) or "identity" not in run:
        raise DataError(f"{folder / RUN} does not describe a distillation: expected one written by `amphista distill`")
    return run


def read_answered(folder: Path, process: int | None = None) -> list[Answered]:
    """Every finished conversation of a folder (or of one process), each once, by id; also while the run goes on."""
    name = "*" if process is None else str(process)
    journals = [one for path in sorted(folder.glob(f"journal-{name}.jsonl")) for one in read_journal(path)[0]]
    found = {one.id: one for path in sorted(folder.glob(f"rows-{name}-*.safetensors")) for one in read_shard(path)}
    return sorted({**{one.id: one for one in journals}, **found}.values(), key=lambda one: one.id)


def read_folder(folder: Path, fingerprint: Fingerprint | None = None) -> list[TokenRow]:
    """All rows of a folder, in the order of their ids; raises DataError when it was made with another tokenizer."""
    run = read_run(folder)
    if fingerprint is not None:
        made_by, needed = run["identity"].get("target", {}), asdict(fingerprint)
        if any(made_by.get(name) != needed[name] for name in ("vocab_size", "tokenizer_sha256")):
            raise DataError(
                f"{folder} was distilled from {run.get('target')}, whose tokenizer is not this target's: distill the "
                "prompts again with this target"
            )
    return [row for answered in read_answered(folder) for row in answered.rows]
