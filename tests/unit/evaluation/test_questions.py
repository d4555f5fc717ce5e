"""evaluation/questions.py: formats, named sets, their origin, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import tracemalloc

import pytest

from amphista.errors import ConfigError, DataError
from amphista.evaluation import questions as module
from amphista.evaluation.questions import NAMED_SETS, NamedSet, load_questions

CODE = {
    "task_id": "Own/0",
    "prompt": "def twice(x):\n    '''Twice x.'''\n",
    "entry_point": "twice",
    "test": "def check(f):\n    assert f(2) == 4\n",
}


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_every_format(tmp_path):
    path = write(
        tmp_path / "all.jsonl",
        [
            {"question_id": 81, "category": "writing", "turns": ["One?", "Two?"], "reference": ["a", "b"]},
            {"question_id": 90, "category": "rag", "turns": ["Three?"]},
            {"question": "Ann has 2 pears and buys 1. How many?", "answer": "2 + 1 = 3\n#### 3"},
            CODE,
            {"prompt": "Plain"},
            {"id": "m", "messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hey"}]},
        ],
    )
    found = load_questions(str(path))
    assert [q.id for q in found.questions] == [81, 90, 3, "Own/0", 5, "m"]
    assert [q.task for q in found.questions] == ["mt_bench", "rag", "all", "all", "all", "all"]
    assert found.questions[0].category == "writing" and found.questions[0].turns == ["One?", "Two?"]
    assert found.questions[2].turns == ["Ann has 2 pears and buys 1. How many?"]
    assert found.questions[3].turns == [CODE["prompt"]]
    assert found.questions[5].history == [{"role": "system", "content": "Brief."}]
    assert found.questions[5].turns == ["Hey"]
    assert (found.name, found.full_size, found.count) == ("all.jsonl", 6, "6 questions")
    assert found.tasks == ["mt_bench", "rag", "all"]


def test_a_sample_is_spread_evenly_and_says_of_how_many(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"id": i, "category": f"c{i // 4}", "prompt": f"p{i}"} for i in range(12)])
    found = load_questions(str(path), limit=3)
    assert [q.id for q in found.questions] == [0, 4, 8]
    assert found.count == "3 of 12 questions"
    assert found.sha256 != load_questions(str(path)).sha256
    assert found.sha256 == load_questions(str(path), limit=3).sha256
    assert load_questions(str(path), limit=99).count == "12 questions"
    with pytest.raises(ConfigError, match="--limit is 0"):
        load_questions(str(path), limit=0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"question_id": 7}, "line 2: a question without turns"),
        ({"question_id": 7, "turns": []}, "a question without turns"),
        ({"question_id": 7, "turns": ["fine", " "]}, "a question without turns"),
        ({"question_id": 7, "turns": "no list"}, "a question without turns"),
        ({"question_id": None, "turns": ["x"]}, "id is None"),
        ({"question_id": True, "turns": ["x"]}, "id is True"),
        ({"turns": ["x"], "category": 3}, "category is 3"),
        ({"turns": ["x"], "category": "\x1b]0;title\x07"}, "category is"),
        ({"turns": ["x"], "id": "x" * 500}, "expected a short text"),
        ({"turns": ["x"], "id": [[[[[[[[[1]]]]]]]]]}, "expected a short text"),
        ({"question": " ", "answer": "#### 1"}, "a question without turns"),
        ({"prompt": {"text": "x"}}, "a question without turns"),
        ({"question_id": "\ud800", "turns": ["x"]}, "id is"),
        ({"turns": ["x"], "category": "\udfff"}, "category is"),
        ({"turns": ["\ud800"]}, "a question without turns"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "'messages' must be"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "the user's"),
        ({"messages": ["a"]}, "'messages' must be"),
        ({"question_id": 1, "turns": ["again"]}, "more than one question with the id '1'"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, said):
    path = write(tmp_path / "q.jsonl", [{"question_id": 1, "turns": ["fine"]}, line])
    with pytest.raises(DataError, match=said):
        load_questions(str(path))


def test_unknown_names_and_empty_files(tmp_path):
    with pytest.raises(ConfigError, match=r"neither a question file nor one of the named sets mt_bench"):
        load_questions("mtbench")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no questions"):
        load_questions(str(tmp_path / "empty.jsonl"))


def test_a_named_set_from_a_folder_or_the_environment(tmp_path, monkeypatch):
    write(tmp_path / "gsm8k_test.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    monkeypatch.delenv(module.DATA_VARIABLE, raising=False)
    assert load_questions("gsm8k", tmp_path).count == "1 of 1319 questions"
    with pytest.raises(ConfigError, match="no pinned origin"):
        load_questions("gsm8k")
    monkeypatch.setenv(module.DATA_VARIABLE, str(tmp_path))
    assert load_questions("gsm8k").name == "gsm8k"
    with pytest.raises(ConfigError, match=r"holds no humaneval\.jsonl"):
        load_questions("humaneval")
    with pytest.raises(ConfigError, match="does not exist"):
        load_questions("gsm8k", tmp_path / "nowhere")


def test_fetched_once_and_only_if_it_is_the_pinned_file(tmp_path, monkeypatch):
    monkeypatch.delenv(module.DATA_VARIABLE, raising=False)
    monkeypatch.setenv("AMPHISTA_CACHE", str(tmp_path / "cache"))
    origin = write(tmp_path / "origin.jsonl", [{"question_id": 1, "category": "qa", "turns": ["Invented?"]}])
    digest = hashlib.sha256(origin.read_bytes()).hexdigest()
    monkeypatch.setitem(NAMED_SETS, "spec_bench", NamedSet(("s.jsonl",), 480, origin.as_uri(), digest))
    assert load_questions("spec_bench").count == "1 of 480 questions"
    origin.unlink()
    assert load_questions("spec_bench").questions[0].turns == ["Invented?"]  # from the cache
    monkeypatch.setitem(NAMED_SETS, "spec_bench", NamedSet(("s.jsonl",), 480, origin.as_uri(), "0" * 64))
    with pytest.raises(DataError, match=r"cannot fetch spec_bench .* name it with --data"):
        load_questions("spec_bench")
    write(origin, [{"question_id": 1, "turns": ["Changed?"]}])
    with pytest.raises(DataError, match="is not the file known as spec_bench"):
        load_questions("spec_bench")


def test_lines_that_are_no_json_are_named(tmp_path):
    """Brackets nested beyond any reader's depth, numbers without end, bytes that are no text."""
    for number, content in enumerate(
        (b"[" * 200_000, b'{"prompt": ' + b"[" * 200_000, b'{"id": ' + b"9" * 9999, b"\xff{")
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(content + b"\n")
        with pytest.raises(DataError):
            load_questions(str(path))


def test_what_unpacks_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "q.jsonl.gz"
    with gzip.open(path, "wb") as stream:
        for _ in range(70):
            stream.write(b" " * (1 << 20))
    tracemalloc.start()
    with pytest.raises(DataError, match="line 1 is longer than 64 MB"):
        load_questions(str(path))
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
    monkeypatch.setattr(module, "MAX_CHARACTERS", 10)
    with pytest.raises(DataError, match="more than 10 characters"):
        load_questions(str(write(tmp_path / "q.jsonl", [{"prompt": "x" * 6}] * 9)))
