"""train/conversations.py: prompts of every form, their names, and what is refused."""

from __future__ import annotations

import gzip
import json
import sys
import types

import pytest

from amphista.errors import ConfigError, DataError
from amphista.train.conversations import load_conversations

LINES = [
    {"id": "a", "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "1"},
                             {"role": "assistant", "content": "no"}, {"role": "user", "content": "2"}]},
    {"question_id": 81, "turns": ["x", "y"]},
    {"prompt": "z"},
]  # fmt: skip


def write(path, lines):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
    return str(path)


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_conversations_lose_their_answers_and_have_names(tmp_path, name):
    found = load_conversations([write(tmp_path / name, LINES)])
    assert list(found.conversations) == ["a", f"{name}:81", f"{name}:3"]
    texts = [[message["content"] for message in messages] for messages in found.conversations.values()]
    assert texts == [["S", "1", "2"], ["x", "y"], ["z"]] and found.left_out.sentence() == ""
    assert found.conversations["a"][0]["role"] == "system"
    assert list(found.sources) == [name] and len(found.sources[name]) == 64


def test_several_files_and_a_limit(tmp_path):
    first, second = write(tmp_path / "1.jsonl", LINES), write(tmp_path / "2.jsonl", LINES[1:])
    assert list(load_conversations([first, second], 4).conversations)[2:] == ["1.jsonl:3", "2.jsonl:81"]
    digest = load_conversations([first]).sources["1.jsonl"]
    write(tmp_path / "1.jsonl", LINES[:2])
    assert load_conversations([first]).sources["1.jsonl"] != digest


UNUSABLE = {
    json.dumps(LINES[0]): "line 3: the id 'a' is there twice",
    '{"id": "s", "messages": [{"role": "system", "content": "S"}]}': "line 3: conversation 's' has no user turn",
    '{"question": "?"}': "line 3 has none of",
    '{"prompt": " "}': "line 3: 'prompt' must be a text",
    "{broken": "line 3 is not JSON",
    "null": "line 3 is a JSON null",
}


@pytest.mark.parametrize("line", UNUSABLE)
def test_an_unusable_line_is_left_out_and_named(tmp_path, line):
    path = write(tmp_path / "p.jsonl", LINES[:2])
    with open(path, "a") as stream:
        stream.write(line + "\n" + json.dumps(LINES[2]) + "\n")
    found = load_conversations([path])
    assert list(found.conversations) == ["a", "p.jsonl:81", "p.jsonl:4"]
    assert found.left_out.count == 1 and UNUSABLE[line] in found.left_out.sentence()
    assert str(tmp_path) not in json.dumps(found.left_out.record())


@pytest.mark.parametrize("lines", [[], [{"question": "?"}]])
def test_a_file_without_any_prompt_is_an_error(tmp_path, lines):
    with pytest.raises(DataError, match="holds no prompts" + (".*line 1 has none of" if lines else "")):
        load_conversations([write(tmp_path / "p.jsonl", lines)])


def test_missing_and_doubled_sources(tmp_path):
    with pytest.raises(ConfigError, match="no prompts"):
        load_conversations([])
    for name in ("nowhere.jsonl", "data/nowhere.jsonl.gz", "./a/b"):
        with pytest.raises(DataError, match="there is no file"):
            load_conversations([name])
    (tmp_path / "x").mkdir()
    paths = [write(folder / "p.jsonl", LINES) for folder in (tmp_path, tmp_path / "x")]
    with pytest.raises(ConfigError, match=r"two sources are called p.jsonl"):
        load_conversations(paths)


def test_a_data_set_without_its_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"the package datasets is missing: pip install 'amphista\[data\]'"):
        load_conversations(["owner/name"])


def test_a_data_set_that_cannot_be_loaded_is_named(monkeypatch):
    def fails(name, split):
        raise RuntimeError(f"no {name}, no {split}\nlong trace")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fails))
    with pytest.raises(DataError, match=r"cannot load the data set owner/name:test: no owner/name, no test$"):
        load_conversations(["owner/name:test"])
