"""evaluation/records.py: what is on disk after a kill, and what is refused."""

from __future__ import annotations

import pytest

from amphista.errors import DataError
from amphista.evaluation.records import Record, RecordFile, read_groups, read_records
from amphista.files import read_json

METHODS = ["none", "fast"]


def record(method="none", question="1", turn=0, **fields):
    base = dict(id=question, category="c", task="t", turn=turn, repeat=0, method=method, seed=5)
    return Record(**base | fields)


GROUPS = [
    [record(token_ids=[1, 2], pieces=["ä", "b"], accepted=[0]), record("fast", error="RuntimeError: no")],
    [record(turn=1), record("fast", turn=1, divergence={"position": 3, "margin": None}, matches=False)],
]


@pytest.fixture
def path(tmp_path):
    file = RecordFile(tmp_path / "records.jsonl")
    for group in GROUPS:
        file.append(group)
    return tmp_path / "records.jsonl"


def test_round_trip(path):
    assert read_records(path) == GROUPS[0] + GROUPS[1]
    assert read_records(path)[0].text == "äb" and read_records(path)[1].failed
    assert b"accepted" not in path.read_bytes().splitlines()[1]  # defaults are not written


def test_every_possible_kill_leaves_whole_groups(path):
    content = path.read_bytes()
    first = len(b"\n".join(content.split(b"\n")[:2])) + 1
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        expected = GROUPS[0] * (length >= first) + GROUPS[1] * (length == len(content))
        assert read_groups(path, METHODS) == expected


def test_a_resumed_file_is_cut_back_to_whole_groups(path):
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(DataError, match="ends in the middle of a record"):
        read_records(path)
    file = RecordFile(path, read_groups(path, METHODS))
    file.append(GROUPS[1])
    assert path.read_bytes() == content


def test_damage_elsewhere_is_named(path):
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:30], *lines[2:]]))
    for read in (read_records, lambda p: read_groups(p, METHODS)):
        with pytest.raises(DataError, match="line 2 is no record"):
            read(path)
    path.write_bytes(b"\n".join([lines[0], *lines[2:]]))
    with pytest.raises(DataError, match=r"question 1, turn 0 has records of \['none'\]"):
        read_groups(path, METHODS)
    path.write_bytes(b'{"id": "1"}\n')
    with pytest.raises(DataError, match="line 1 is no record"):
        read_records(path)
    path.write_bytes(b"[]\n")
    with pytest.raises(DataError, match="line 1 is no record"):
        read_records(path)


def test_json_files(tmp_path):
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(DataError, match="not a JSON object"):
        read_json(tmp_path / "run.json")
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path / "missing.json")
