"""train/distilled.py: what is written is read back, every torn end is survived, damage and other runs are named."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from amphista.errors import ConfigError, DataError
from amphista.target.spec import Fingerprint
from amphista.train.distilled import (
    Answered,
    AnswerFile,
    answer_numbers,
    answer_spans,
    read_answered,
    read_folder,
    read_run,
    token_rows,
)
from amphista.train.prompts import read_rows

FINGERPRINT = Fingerprint(
    family="llama", hidden_size=8, embedding_size=8, vocab_size=300, tokenizer_sha256="t", lm_head_sha256="h"
)
RUN = {"identity": {"seed": 1, "target": {**dataclasses.asdict(FINGERPRINT), "type": "float32"}}, "target": "tiny"}


def answered(name, *lengths, temperature=0.7):
    """A conversation with a row per length; answers of 2 and the rest in turn."""
    rows = []
    for length in lengths:
        ids = [(length * 7 + i) % 300 for i in range(length)]
        rows.append((ids, [0] * (length - 5) + [1, 1, 0, 2, 2] if length > 5 else [0] + [1] * (length - 1)))
    return Answered(name, tuple(token_rows(name, rows, temperature)), ("stop", "length")[: len(rows)])


SOME = [answered("a", 12), answered("b#1", 3, 9, temperature=0.0), Answered("c", skipped="too löng"), answered("ü", 40)]


def test_marks_are_spans():
    assert answer_spans([0, 1, 1, 0, 2, 3, 3]) == [(1, 3), (4, 5), (5, 7)]
    source = random.Random(0)
    for _ in range(50):
        spans, at = [], 0
        for _ in range(source.randrange(5)):
            start = at + source.randrange(3)
            at = start + source.randrange(1, 4)
            spans.append((start, at))
        length = at + source.randrange(3)
        assert answer_spans(answer_numbers(spans, length)) == spans and len(answer_numbers(spans, length)) == length


def filled(folder, conversations=SOME, process=0):
    with AnswerFile(folder, process, RUN) as file:
        for one in conversations:
            file.add(one)
    return folder


def test_what_is_added_is_read_back_and_remembered(tmp_path):
    for one in SOME:
        with AnswerFile(tmp_path, 0, RUN) as file:
            assert one.id not in file.done
            file.add(one)
    assert read_answered(tmp_path) == SOME
    with AnswerFile(tmp_path, 0, RUN) as file:
        assert file.done == {"a", "b#1", "c", "ü"}


def test_every_torn_end_costs_the_last_conversation_alone(tmp_path):
    path = filled(tmp_path) / "rows-0.jsonl"
    lines = [one.line() for one in SOME]
    content = path.read_bytes()
    assert content == b"".join(lines)
    ends = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
    for length in range(0, len(content) + 1, 7):
        path.write_bytes(content[:length])
        whole = sum(length >= end for end in ends[1:])
        assert read_answered(tmp_path) == SOME[:whole]
        with AnswerFile(tmp_path, 0, RUN) as file:
            assert file.done == {one.id for one in SOME[:whole]}
            for one in SOME[whole:]:
                file.add(one)
        assert path.read_bytes() == content


def test_damage_is_named(tmp_path):
    path = filled(tmp_path) / "rows-0.jsonl"
    path.write_bytes(SOME[0].line()[:20] + b"\n" + SOME[1].line())
    with pytest.raises(DataError, match=r"rows-0.jsonl line 1 is damaged"):
        read_answered(tmp_path)
    with pytest.raises(DataError, match=r"rows-0.jsonl line 1 is damaged"):
        AnswerFile(tmp_path, 0, RUN)
    path.unlink()
    AnswerFile(tmp_path, 0, RUN).__exit__(None, None, None)


def test_processes_do_not_see_each_other_and_none_runs_twice(tmp_path):
    with AnswerFile(tmp_path, 0, RUN) as first, AnswerFile(tmp_path, 10, RUN) as second:
        first.add(SOME[0])
        second.add(answered("b#1", 9, 9, 9))
        assert first.done == {"a"} and second.done == {"b#1"}
        with pytest.raises(ConfigError, match=r"another process is distilling into .*rows-0"):
            AnswerFile(tmp_path, 0, RUN)
    with AnswerFile(tmp_path, 0, RUN) as first:
        assert first.done == {"a"}


def test_another_run_is_named_by_what_differs(tmp_path):
    filled(tmp_path)
    target = {**RUN["identity"]["target"], "type": "int8"}
    with pytest.raises(
        ConfigError, match=r"another distillation: seed is 2, there it is 1; target.type is int8, there"
    ):
        AnswerFile(tmp_path, 0, {"identity": {"seed": 2, "target": target}})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="cannot read"):
        AnswerFile(tmp_path, 0, RUN)


@pytest.fixture
def folder(tmp_path):
    filled(tmp_path, SOME[1:3])
    path = filled(tmp_path, [SOME[3], SOME[0]], 1) / "rows-1.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "torn')
    return tmp_path


def test_a_folder_holds_conversations_in_the_order_of_ids(folder):
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
