from __future__ import annotations

import io
import json

import pytest

from amphista.errors import DataError, RequestError
from amphista.prompts import PromptRecord, from_arguments, read_prompts

MESSAGES = [{"role": "system", "content": ""}, {"role": "user", "content": "hello"}]


def written(tmp_path, *lines):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_arguments_and_standard_input():
    records = from_arguments(["one", "-", "two"], io.StringIO("from\nstdin\n"))
    assert records == [PromptRecord(0, ["one"]), PromptRecord(1, ["from\nstdin\n"]), PromptRecord(2, ["two"])]
    assert from_arguments([], io.StringIO("unread")) == []


@pytest.mark.parametrize("prompts", [["one", " \n"], ["one", "-"]])
def test_an_empty_prompt_is_refused_by_number(prompts):
    with pytest.raises(RequestError, match="prompt 1 is empty"):
        from_arguments(prompts, io.StringIO(""))


def test_the_three_forms_of_a_line(tmp_path):
    file = written(
        tmp_path,
        {"question_id": 81, "turns": ["a", "b"]},
        "",
        {"messages": MESSAGES},
        {"id": "x", "question_id": 9, "prompt": "c", "other": 1},
    )
    assert read_prompts(file) == [PromptRecord(81, ["a", "b"]), PromptRecord(3, [], MESSAGES), PromptRecord("x", ["c"])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"turns": []}, "'turns' must be"),
        ({"turns": "a"}, "'turns' must be"),
        ({"turns": ["a", " "]}, "'turns' must be"),
        ({"turns": ["a", 3]}, "'turns' must be"),
        ({"messages": []}, "'messages' must be"),
        ({"messages": ["a"]}, "'messages' must be"),
        ({"messages": [{"role": "user"}]}, "'messages' must be"),
        ({"messages": [{"role": "user", "content": None}]}, "'messages' must be"),
        ({"prompt": ""}, "'prompt' must be"),
        ({"prompt": 3}, "'prompt' must be"),
        ({"text": "a"}, "its keys: text"),
        ({}, "its keys: none"),
        ({"id": [1], "prompt": "a"}, "expected a string or a number"),
        ("nonsense", "is not JSON"),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(tmp_path, line, message):
    with pytest.raises(DataError) as caught:
        read_prompts(written(tmp_path, {"prompt": "fine"}, line))
    assert "line 2" in str(caught.value) and message in str(caught.value)


def test_text_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    (record,) = read_prompts(written(tmp_path, {"messages": [{"role": "user", "content": parts}]}))
    assert record.messages == [{"role": "user", "content": "hello"}]


def test_a_mark_in_front_of_standard_input_is_no_text():
    assert from_arguments(["-"], io.StringIO("\ufeffhello")) == [PromptRecord(0, ["hello"])]


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(written(tmp_path, ""))
