"""Evaluation questions: MT-Bench, Spec-Bench, HumanEval, GSM8K or a file in one of their formats, checked whole.

A question is text to be asked and nothing else: what a file says beside it (answers, tests, entry points) is not read.

Named sets are read from a data folder; MT-Bench (arXiv 2306.05685) and Spec-Bench (arXiv 2401.07851) else come from
their public origin, into the user's cache, and only if their sha256 is the pinned one. Question text stays in memory:
records and reports carry ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amphista.errors import ConfigError, DataError
from amphista.files import write_file
from amphista.jsonl import read_lines
from amphista.prompts import is_message, is_text
from amphista.target.gguf import cache_folder

DATA_VARIABLE = "AMPHISTA_DATA"
DOWNLOAD_SECONDS = 60
MAX_NAME = 200  # characters of an id or a category
MAX_CHARACTERS = 200_000_000  # of all questions: what is unpacked may be a thousand times its file
MT_BENCH_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
ID_KEYS = ("question_id", "id", "task_id")
PROMPT_KEYS = ("prompt", "question")


@dataclass(frozen=True)
class NamedSet:
    """File names to look for, the number of questions of the whole set, and a pinned public origin if it has one."""

    files: tuple[str, ...]
    full_size: int
    url: str | None = None
    sha256: str | None = None


NAMED_SETS = {
    "mt_bench": NamedSet(
        ("mt_bench.jsonl",),
        80,
        "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data/mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    "spec_bench": NamedSet(
        ("spec_bench.jsonl",),
        480,
        "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl",
        "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04",
    ),
    "humaneval": NamedSet(("humaneval.jsonl", "HumanEval.jsonl"), 164),
    "gsm8k": NamedSet(("gsm8k.jsonl", "gsm8k_test.jsonl"), 1319),
}


@dataclass(frozen=True)
class Question:
    """User turns to be asked one after the other, behind a `history` of messages if there is one.

    category is the set's own; task groups categories the way the set reports them.
    """

    id: str | int
    category: str
    task: str
    turns: list[str]
    history: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class QuestionSet:
    """Questions in order. `sha256` identifies their content; `full_size` is how many the source or set holds."""

    name: str
    questions: list[Question]
    full_size: int
    sha256: str

    @property
    def count(self) -> str:
        """`480 questions`, or `60 of 480 questions`."""
        held = len(self.questions)
        return f"{held} questions" if held == self.full_size else f"{held} of {self.full_size} questions"

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order in which they first appear."""
        return list(dict.fromkeys(question.task for question in self.questions))

    def sample(self, limit: int | None) -> QuestionSet:
        """`limit` questions spread evenly over the set (sets are sorted by task); all of them if there are no more."""
        if limit is None or limit >= len(self.questions):
            return self
        if limit < 1:
            raise ConfigError(f"--limit is {limit}: expected at least 1 question")
        total = len(self.questions)
        return _as_set(self.name, [self.questions[i * total // limit] for i in range(limit)], self.full_size)


def load_questions(name: str, data: Path | None = None, limit: int | None = None) -> QuestionSet:
    """A named set or a JSONL file; raises DataError naming the first bad line, ConfigError for an unknown name."""
    if name in NAMED_SETS:
        path = _find(name, data) or _fetch(name)
        full_size: int | None = NAMED_SETS[name].full_size
    else:
        path, full_size = Path(name).expanduser(), None
        if not path.is_file():
            known = ", ".join(NAMED_SETS)
            raise ConfigError(f"{name!r} is neither a question file nor one of the named sets {known}")
        name = path.name
    questions, size = [], 0
    for number, line in read_lines(path):
        questions.append(_question(line, f"{path} line {number}", number))
        asked = [*questions[-1].turns, *(message["content"] for message in questions[-1].history)]
        size += sum(map(len, asked))
        if size > MAX_CHARACTERS:
            raise DataError(f"{path} holds more than {MAX_CHARACTERS:,} characters: no set of questions is that large")
    if not questions:
        raise DataError(f"{path} holds no questions")
    twice = [key for key, count in Counter(str(question.id) for question in questions).items() if count > 1]
    if twice:
        raise DataError(f"{path} has more than one question with the id {reprlib.repr(twice[0])}: ids must be distinct")
    return _as_set(name, questions, full_size or len(questions)).sample(limit)


def _as_set(name: str, questions: list[Question], full_size: int) -> QuestionSet:
    content = json.dumps([[q.id, q.category, q.turns, q.history] for q in questions], ensure_ascii=False)
    return QuestionSet(name, questions, full_size, hashlib.sha256(content.encode()).hexdigest())


# -- where a set comes from ---------------------------------------------------------------------------------------


def _find(name: str, data: Path | None) -> Path | None:
    """The set's file in the folder the user named; a folder that lacks it is no error where an origin exists."""
    folder = data or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if folder is None:
        return None
    if not folder.is_dir():
        raise ConfigError(f"the data folder {folder} does not exist")
    wanted = NAMED_SETS[name]
    found = next((folder / file for file in wanted.files if (folder / file).is_file()), None)
    if found is None and wanted.url is None:
        raise ConfigError(f"the data folder {folder} holds no {' or '.join(wanted.files)}")
    return found


def _fetch(name: str) -> Path:
    """The set from its public origin, kept in the cache; raises DataError when it is not the pinned file."""
    wanted = NAMED_SETS[name]
    if wanted.url is None or wanted.sha256 is None:
        raise ConfigError(f"{name} has no pinned origin: put {wanted.files[0]} into a folder and name it with --data")
    path = cache_folder() / "questions" / f"{name}-{wanted.sha256[:16]}.jsonl"
    if path.is_file() and _sha256(path.read_bytes()) == wanted.sha256:
        return path
    try:
        with urllib.request.urlopen(wanted.url, timeout=DOWNLOAD_SECONDS) as response:
            content: bytes = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"cannot fetch {name} from {wanted.url}: {error}. Put {wanted.files[0]} into a folder and name it "
            f"with --data (or {DATA_VARIABLE})"
        ) from error
    if _sha256(content) != wanted.sha256:
        raise DataError(f"{wanted.url} is not the file known as {name}: its sha256 is {_sha256(content)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content)
    return path


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- one line of a file -------------------------------------------------------------------------------------------


def _question(line: dict[str, Any], where: str, number: int) -> Question:
    name = next((line[key] for key in ID_KEYS if key in line), number)
    if isinstance(name, bool) or not (isinstance(name, int) or _is_name(name)):
        raise DataError(f"{where}: the question's id is {reprlib.repr(name)}, expected a short text or a number")
    category = line.get("category", "all")
    if not _is_name(category):
        raise DataError(f"{where}: category is {reprlib.repr(category)}, expected a short text")
    task = "mt_bench" if category in MT_BENCH_CATEGORIES else category
    if "messages" in line:
        messages = line["messages"]
        if not isinstance(messages, list) or not messages or not all(is_message(m) for m in messages):
            raise DataError(f"{where}: 'messages' must be a list of objects with texts 'role' and 'content'")
        if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise DataError(f"{where}: the last message must be the user's, and not empty")
        return Question(name, category, task, [messages[-1]["content"]], messages[:-1])
    turns = next(([line[key]] for key in PROMPT_KEYS if key in line), line.get("turns"))
    if not isinstance(turns, list) or not turns or not all(is_text(t) and t.strip() for t in turns):
        raise DataError(
            f"{where}: a question without turns: expected 'turns', a list of one or more texts that are not empty "
            f"(or 'prompt', 'question', 'messages'); its keys: {reprlib.repr(list(line))}"
        )
    return Question(name, category, task, turns)


def _is_name(value: Any) -> bool:
    """Ids and categories are written to terminals, tables and figures."""
    return isinstance(value, str) and value.isprintable() and len(value) <= MAX_NAME
