"""train/shards.py: what is written is read back, damage is named, a kill leaves whole conversations."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from amphista.errors import DataError
from amphista.target.spec import Fingerprint
from amphista.train.prompts import read_rows
from amphista.train.rows import TokenRow
from amphista.train.shards import (
    Answered,
    journal_line,
    marks_of,
    read_answered,
    read_folder,
    read_journal,
    read_run,
    read_shard,
    shard_ids,
    spans_of,
    write_shard,
)

FINGERPRINT = Fingerprint(
    family="llama", hidden_size=8, embedding_size=8, vocab_size=300, tokenizer_sha256="t", lm_head_sha256="h"
)


def answered(name, *lengths, temperature=0.7):
    """A conversation with a row per length; answers of 2 and the rest in turn."""
    rows = []
    for number, length in enumerate(lengths):
        ids = [(length * 7 + i) % 300 for i in range(length)]
        marks = [0] * (length - 5) + [1, 1, 0, 2, 2] if length > 5 else [0] + [1] * (length - 1)
        rows.append(TokenRow(f"{name}/{number}" if number else name, name.split("#")[0], ids, marks, temperature))
    return Answered(name, tuple(rows), ("stop", "length")[: len(rows)])


SOME = [answered("a", 12), answered("b#1", 3, 9, temperature=0.0), Answered("c", skipped="too löng"), answered("ü", 40)]


def test_marks_are_spans():
    assert spans_of([0, 1, 1, 0, 2, 3, 3]) == [(1, 3), (4, 5), (5, 7)]
    source = random.Random(0)
    for _ in range(50):
        spans, at = [], 0
        for _ in range(source.randrange(5)):
            start = at + source.randrange(3)
            at = start + source.randrange(1, 4)
            spans.append((start, at))
        length = at + source.randrange(3)
        assert spans_of(marks_of(spans, length)) == spans and len(marks_of(spans, length)) == length


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, np.uint16), (65536, np.uint16), (65537, np.int32)])
def test_shard_round_trip(tmp_path, vocab_size, dtype):
    path = tmp_path / "rows-0-00000.safetensors"
    write_shard(path, SOME, vocab_size)
    assert read_shard(path) == SOME and shard_ids(path) == ["a", "b#1", "c", "ü"]
    with safe_open(path, framework="np") as stored:
        assert stored.get_tensor("token_ids").dtype == dtype
    assert not list(tmp_path.glob("*.partial"))


def test_a_shard_of_skipped_conversations_only(tmp_path):
    write_shard(tmp_path / "rows-0-00000.safetensors", [SOME[2]], 300)
    assert read_shard(tmp_path / "rows-0-00000.safetensors") == [SOME[2]]


def test_journal_round_trip_and_every_torn_end(tmp_path):
    path = tmp_path / "journal-0.jsonl"
    lines = [journal_line(one) for one in SOME]
    content = b"".join(lines)
    ends = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = sum(length >= end for end in ends[1:])
        assert read_journal(path) == (SOME[:whole], ends[whole])


def test_damage_is_named(tmp_path):
    journal, shard = tmp_path / "journal-0.jsonl", tmp_path / "rows-0-00000.safetensors"
    journal.write_bytes(journal_line(SOME[0])[:20] + b"\n" + journal_line(SOME[1]))
    with pytest.raises(DataError, match=r"journal-0.jsonl line 1 is damaged"):
        read_journal(journal)
    write_shard(shard, SOME, 300)
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(DataError, match="damaged or unreadable"):
        read_shard(shard)
    save_file({"x": np.zeros(1)}, shard)
    with pytest.raises(DataError, match="not a shard of distilled rows"):
        read_shard(shard)


@pytest.fixture
def folder(tmp_path):
    run = {"identity": {"target": dataclasses.asdict(FINGERPRINT)}, "target": "tiny"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    write_shard(tmp_path / "rows-0-00000.safetensors", SOME[1:3], 300)
    write_shard(tmp_path / "rows-1-00000.safetensors", SOME[3:], 300)
    (tmp_path / "journal-1.jsonl").write_bytes(journal_line(SOME[3]) + journal_line(SOME[0]) + b'{"id": "torn')
    return tmp_path


def test_a_folder_holds_each_conversation_once_in_the_order_of_ids(folder):
    assert read_answered(folder) == SOME
    assert read_answered(folder, 0) == SOME[1:3] and read_answered(folder, 1) == [SOME[0], SOME[3]]
    assert [row.id for row in read_folder(folder, FINGERPRINT)] == ["a", "b#1", "b#1/1", "ü"]


def test_training_reads_folders_beside_files(folder, tmp_path):
    line = {"id": "file", "prompt_ids": [1, 2], "answer_ids": [3], "temperature": 0.0}
    (tmp_path / "more.jsonl").write_text(json.dumps(line) + "\n")
    rows = read_rows(
        [folder, tmp_path / "more.jsonl"], None, {257}, vocab_size=300, max_len=10, fingerprint=FINGERPRINT
    )
    assert [(row.id, len(row.token_ids)) for row in rows] == [("a", 10), ("b#1", 3), ("b#1/1", 9), ("file", 3)]
    assert rows[1].group == rows[2].group == "b" and rows[1].temperature == 0.0
    with pytest.raises(DataError, match=r"row 'ü' holds token id"):
        read_rows([folder], None, {257}, vocab_size=200, max_len=50)


@pytest.mark.parametrize("change", [{"vocab_size": 301}, {"tokenizer_sha256": "other"}])
def test_rows_of_another_tokenizer_are_refused(folder, change):
    with pytest.raises(DataError, match="distilled from tiny, whose tokenizer is not this target's"):
        read_folder(folder, dataclasses.replace(FINGERPRINT, **change))
    assert read_folder(folder, dataclasses.replace(FINGERPRINT, lm_head_sha256="a fine-tune"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no run.json"):
        read_folder(tmp_path)
    for content in ("[]", "{}", "{"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(DataError, match=r"run.json"):
            read_run(tmp_path)
