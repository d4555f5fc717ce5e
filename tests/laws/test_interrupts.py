"""Ctrl-C anywhere inside a step, then reading on: the same tokens, the same text, caches that hold what was read."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

import amphista
from amphista.cache.static import KVCache
from amphista.engine.params import SamplingParams
from amphista.engine.sequence import Sequence
from amphista.errors import CapacityError
from amphista.llm import LLM
from amphista.target.target import Target
from amphista.target.text import Text
from tests.laws.test_native import NEEDS_COMPILER
from tests.tiny import byte_tokenizer, real_drafters, tiny_model

SRC = str(Path(amphista.__file__).parent)
PARAMS = SamplingParams(
    max_new_tokens=11, temperature=0.9, seed=3, repetition_penalty=1.1, presence_penalty=0.5, stop="never", logprobs=1
)
MOST_PLACES = 16
PATHS = ["stock", "fast", "static", pytest.param("native", marks=NEEDS_COMPILER)]


@pytest.fixture(scope="module", params=PATHS)
def llm(request):
    """With heads and lookup, on one of the four forwards; heads draft in C where it verifies."""
    target = Target(tiny_model(), Text(byte_tokenizer()), static=request.param == "static")
    assert request.param == "stock" or target.speed_up(native=request.param == "native"), target.why_stock
    assert target.is_native == (request.param == "native")
    return LLM(target, real_drafters(target)["amphista-full+lookup"], tree=6)


class Interrupt:
    """Raises KeyboardInterrupt where our code makes its n-th call; counts all calls without one."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.num_calls = at, 0

    def __call__(self, frame, event, argument):
        code = frame.f_code  # not a generator's, which may be called to close it, where nothing can be raised
        if event == "call" and code.co_filename.startswith(SRC) and not code.co_flags & inspect.CO_GENERATOR:
            self.num_calls += 1
            if self.num_calls - 1 == self.at:
                self.at = None
                raise KeyboardInterrupt(code.co_qualname)

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


def read(llm, *, step: int, at: int | None):
    """An answer that is interrupted at the at-th call of one step (0 is the prefill), and then read on."""
    stream = llm.stream("Tell me", params=PARAMS)
    steps, pieces = stream.steps(), []
    for _ in range(step):
        pieces.append(next(steps).text)
    interrupt = Interrupt(at)
    with interrupt:
        try:
            pieces.append(next(steps).text)
            was_interrupted = False
        except KeyboardInterrupt:
            was_interrupted = True
    pieces += [result.text for result in stream.steps()]
    return stream.answer, "".join(pieces), was_interrupted, interrupt.num_calls


def same(found, expected):
    answer, text, _, _ = found
    wanted = expected[0]
    assert (answer.token_ids, answer.text, text) == (wanted.token_ids, wanted.text, wanted.text)
    assert [one.token_id for one in answer.logprobs] == answer.token_ids
    stats = answer.stats
    assert stats.num_tokens == len(answer.token_ids) == 1 + sum(n + 1 for n in stats.accepted)
    assert len(stats.accepted) == len(stats.expected) == len(stats.step_seconds) == len(stats.tree_nodes)


@pytest.mark.parametrize("step", [0, 3])
def test_an_interrupt_anywhere_changes_nothing(llm, step):
    expected = read(llm, step=step, at=None)
    num_calls = expected[3]
    assert num_calls > 60, "the law would be vacuous"
    hits = 0
    for at in range(0, num_calls, max(1, num_calls // MOST_PLACES)):
        found = read(llm, step=step, at=at)
        hits += found[2]
        same(found, expected)
    assert hits >= MOST_PLACES


@pytest.mark.parametrize("at", ["amphista.engine.sequence.Sequence.take", "amphista.cache.static.KVCache.commit"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_around_commit_changes_nothing(llm, at, when, monkeypatch):
    """The two calls between which tokens and rows disagree, cut before and behind."""
    expected = read(llm, step=0, at=None)
    owner = {"Sequence": Sequence, "KVCache": KVCache}[at.split(".")[-2]]
    name = at.split(".")[-1]
    whole, calls = getattr(owner, name), []

    def breaks_off(*arguments):
        calls.append(1)
        if len(calls) != 4:
            return whole(*arguments)
        if when == "after":
            whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, breaks_off)
    stream = llm.stream("Tell me", params=PARAMS)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    list(stream)
    assert stream.answer.token_ids == expected[0].token_ids and len(calls) > 4


def test_without_the_way_back_it_is_said(llm, monkeypatch):
    """The check at the beginning of a step sees what the way back would have mended."""
    commit, calls = KVCache.commit, []

    def breaks_off(cache, path):
        commit(cache, path)
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(KVCache, "commit", breaks_off)
    stream = llm.stream("Tell me", params=PARAMS)
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "trim", lambda cache, num_rows: None)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    with pytest.raises(CapacityError, match="rows are cached"):
        list(stream)
