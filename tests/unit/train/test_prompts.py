"""Several files may answer one prompt: their rows have ids of their own, on one side of the validation split."""

from __future__ import annotations

import json

from amphista.train.prompts import read_rows


def write(path, names):
    rows = [{"id": name, "prompt_ids": [1, 2], "answer_ids": [3, i]} for i, name in enumerate(names)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ids_of_several_files_are_told_apart(tmp_path):
    one = write(tmp_path / "one.jsonl", ["a", "a#2", "b"])
    two = write(tmp_path / "two.jsonl", ["a", "b", "a#2", "c"])
    rows = read_rows([one, two, one], None, {9}, vocab_size=20, max_len=10)
    names = [row.id for row in rows]
    assert len(set(names)) == len(names) == 10
    assert names[:3] == ["a", "a#2", "b"] and names[3:5] == ["a#3", "b#2"] and names[6] == "c"
    assert [row.group for row in rows] == ["a", "a", "b", "a", "b", "a", "c", "a", "a", "b"]
