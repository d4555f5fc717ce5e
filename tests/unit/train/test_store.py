"""train/store.py: the journal becomes shards, resumes, and never holds a conversation twice."""

from __future__ import annotations

import dataclasses

import pytest

from amphista.errors import ConfigError, DataError
from amphista.train.shards import read_answered, read_shard
from amphista.train.store import RowStore
from tests.unit.train.test_shards import FINGERPRINT, SOME, answered

RUN = {"identity": {"seed": 1, "target": dataclasses.asdict(FINGERPRINT)}, "target": "tiny"}


def store(folder, process=0, run=RUN, rows_per_shard=3):
    return RowStore(folder, process, run, rows_per_shard=rows_per_shard)


def test_a_full_journal_becomes_a_shard(tmp_path):
    with store(tmp_path) as rows:
        for one in SOME[:2]:
            rows.add(one)
        assert len(read_shard(tmp_path / "rows-0-00000.safetensors")) == 2  # three rows
        assert (tmp_path / "journal-0.jsonl").read_bytes() == b""
        for one in SOME[2:]:
            rows.add(one)
        assert rows.done == {"a", "b#1", "c", "ü"}
        assert (tmp_path / "journal-0.jsonl").read_bytes().count(b"\n") == 2
        rows.finish()
    assert [path.name for path in sorted(tmp_path.glob("*"))] == [
        "rows-0-00000.safetensors", "rows-0-00001.safetensors", "run.json",
    ]  # fmt: skip
    assert read_answered(tmp_path) == SOME


def test_shards_are_numbered_on_and_skips_are_remembered(tmp_path):
    for one in SOME:
        with store(tmp_path, rows_per_shard=1) as rows:
            assert one.id not in rows.done
            rows.add(one)
    with store(tmp_path) as rows:
        assert rows.done == {"a", "b#1", "c", "ü"}
        rows.finish()
    names = sorted(path.name for path in tmp_path.glob("rows-*"))
    assert names == [f"rows-0-{n:05d}.safetensors" for n in range(3)]  # the skipped one went with the last
    assert read_answered(tmp_path) == SOME


def test_processes_do_not_see_each_other(tmp_path):
    with store(tmp_path, 0) as first, store(tmp_path, 10) as second, store(tmp_path, 1) as third:
        first.add(SOME[0])
        second.add(answered("b#1", 9, 9, 9))
        third.add(SOME[2])
        assert first.done == {"a"} and second.done == {"b#1"} and third.done == {"c"}
    with store(tmp_path, 1) as third:
        assert third.done == {"c"}
    with store(tmp_path, 1) as held, pytest.raises(ConfigError, match="another process is distilling"):
        store(tmp_path, 1)
    assert held.done == {"c"}


def test_a_torn_line_is_cut_off_before_the_next_is_written(tmp_path):
    with store(tmp_path) as rows:
        rows.add(SOME[0])
    journal = tmp_path / "journal-0.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"id":"x","ro')
    with store(tmp_path) as rows:
        assert rows.done == {"a"}
        rows.add(SOME[3])
    assert read_answered(tmp_path) == [SOME[0], SOME[3]]


def test_an_unfinished_shard_is_no_shard(tmp_path):
    (tmp_path / "rows-0-00000.safetensors.partial").write_bytes(b"cut short")
    with store(tmp_path) as rows:
        rows.add(answered("x", 9, 9, 9))
    assert [one.id for one in read_answered(tmp_path)] == ["x"]


def test_other_settings_are_named(tmp_path):
    with store(tmp_path):
        pass
    other = {"identity": {"seed": 2, "top": "x" * 99, "target": {**RUN["identity"]["target"], "family": "gpt2"}}}
    with pytest.raises(ConfigError) as raised:
        store(tmp_path, run=other)
    message = str(raised.value)
    assert "seed is 2, there it is 1" in message and "target.family is gpt2, there it is llama" in message
    assert f"top is {'x' * 40}..., there it is not set" in message and "vocab_size" not in message
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="cannot read"):
        store(tmp_path)
