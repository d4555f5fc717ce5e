"""Threads on one loaded model: each gets what it gets alone, whoever loaded it, and `path` says what each one runs.

Races are not waited for: what may be overtaken is held up on purpose, and the other thread acts meanwhile.
"""

from __future__ import annotations

import gc
import sys
import threading
import time

import pytest
import torch

from amphista.drafter.captured_drafter import CapturedDrafter
from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.kernels import graph
from amphista.kernels.parts import RotaryTable
from amphista.target.target import Target
from amphista.tree.grow import parse_tree
from amphista.tree.token_tree import TokenTree
from tests.decoding import decode
from tests.tiny import real_drafters, tiny_model

TREE = TokenTree([5, 6, 7], [-1, 0, 0])
PARAMS = SamplingParams(max_new_tokens=24, ignore_eos=True)
PROMPTS = [list(range(3 + 7 * i, 3 + 7 * i + length)) for i, length in enumerate((9, 30, 4, 17))]


def static_target(dtype=torch.float64):
    target = Target(tiny_model(dtype=dtype), static=True)
    assert target.speed_up() and target.is_static
    return target


def elsewhere(function):
    """What a function gives in another thread, which has ended then."""
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start(), thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


class Waiting:
    """Another thread that runs a function and then stays alive, as the workers of a server do."""

    def __init__(self, function):
        self._done, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)

    def _run(self, function):
        self.result = function()
        self._done.set()
        self._go.wait(60)

    def __enter__(self):
        self._thread.start()
        assert self._done.wait(60)
        return self

    def __exit__(self, *error):
        self._go.set()
        self._thread.join()


def forward(target):
    """(whether a recorded forward verified here, the path as told before, and why not)."""
    cache = target.new_cache()
    target.prefill(PROMPTS[0], cache)
    told = target.path, target.why_not_captured
    return target.verify(TREE, cache).choices is not None, *told


# -- whose the graphs are ---------------------------------------------------------------------------------------------


def test_the_thread_that_decodes_has_the_graphs_not_the_one_that_loaded():
    target = static_target()
    assert elsewhere(lambda: forward(target)) == (True, "fast-static", None)


def test_measuring_costs_keeps_no_graphs(tmp_path, monkeypatch):
    from amphista.drafter.proposer import Proposer
    from amphista.engine import costs

    target = static_target()
    measured = {"seconds": {"1": 1.0}, "context": 256, "sequence": 0.0, "cached_row": 0.0, "spread": 1.0}
    monkeypatch.setattr(costs, "load_or_measure", lambda key, measure, is_usable, refresh: measured)
    target.verify(TREE, filled(target))
    costs.tune(target, Proposer(use_lookup=True))
    assert elsewhere(lambda: forward(target))[0]


def filled(target):
    cache = target.new_cache()
    target.prefill(PROMPTS[0], cache)
    return cache


def test_while_another_thread_has_them_this_one_is_told_so(monkeypatch):
    monkeypatch.setattr(graph, "IDLE_SECONDS", 60.0)
    target = static_target()
    with Waiting(lambda: forward(target)) as other:
        assert other.result[0]
        used, path, why = forward(target)
        assert not used and path == "fast" and "another thread decodes with the captured graphs" in why
    assert forward(target) == (True, "fast-static", None), "it has ended"


def test_asking_for_the_path_takes_nothing():
    target = static_target()
    assert target.path == "fast-static" and target.why_not_captured is None
    assert elsewhere(lambda: forward(target))[0]


def test_a_thread_that_rests_hands_over(monkeypatch):
    """As the pool of a server does: all its workers live, one of them answers."""
    monkeypatch.setattr(graph, "IDLE_SECONDS", 0.02)
    target = static_target()
    with Waiting(lambda: forward(target)) as first:
        assert first.result[0]
        time.sleep(0.05)
        with Waiting(lambda: forward(target)) as second:
            assert second.result == (True, "fast-static", None)


def test_what_a_forward_shows_is_kept_for_the_thread_that_still_reads_it(monkeypatch):
    """In mid-step, however long the step takes: its logits lie in the buffers."""
    monkeypatch.setattr(graph, "IDLE_SECONDS", 0.0)
    target = static_target()
    cache = filled(target)
    output = target.verify(TREE, cache)
    before = output.logits.clone()
    assert not elsewhere(lambda: forward(target))[0]
    assert torch.equal(output.logits, before)
    cache.commit([0, 2])
    del output
    gc.collect()
    time.sleep(0.01)
    assert elsewhere(lambda: forward(target))[0]


def test_a_cache_that_lost_its_place_goes_on(monkeypatch):
    """Between two steps another thread takes over; the first one's rows have moved out whole."""
    monkeypatch.setattr(graph, "IDLE_SECONDS", 0.0)
    target = static_target()
    cache, alone = filled(target), filled(target)
    for step in range(4):
        expected = target.verify(TREE, alone).hidden.clone()
        alone.commit([0, 1])
        time.sleep(0.001)
        assert elsewhere(lambda: forward(target))[0]
        found = target.verify(TREE, cache).hidden.clone()
        cache.commit([0, 1])
        assert float((found - expected).abs().max()) < 1e-12, step


def test_a_long_prompt_is_read_outside_of_the_buffers(monkeypatch):
    """It may take longer than a rest: whoever takes over meanwhile must find nothing of it there."""
    monkeypatch.setattr(graph, "IDLE_SECONDS", 0.0)
    target = static_target()
    cache = filled(target)
    target.verify(TREE, cache)
    cache.commit([0])
    real = Target._forward

    def held_up(self, *args, **settings):
        assert cache.buffer is None
        time.sleep(0.005)
        with monkeypatch.context() as patch:
            patch.setattr(Target, "_forward", real)
            assert elsewhere(lambda: forward(target))[0]
        return real(self, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Target, "_forward", held_up)
        target.prefill(PROMPTS[1], cache)
    other = target.new_cache()
    target.prefill([*PROMPTS[0], 5, *PROMPTS[1]], other)
    expected = target.verify(TREE, other).logits.clone()
    assert float((target.verify(TREE, cache).logits - expected).abs().max()) < 1e-10


# -- the same tokens --------------------------------------------------------------------------------------------------


@pytest.fixture
def hasty():
    """Threads are switched as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("name", ["amphista-full", "medusa-own"])
@pytest.mark.parametrize("idle", [0.0, 0.25])
def test_threads_side_by_side_get_what_each_gets_alone(hasty, monkeypatch, name, idle):
    monkeypatch.setattr(graph, "IDLE_SECONDS", idle)
    target = static_target()
    engine = Engine(target, Proposer(real_drafters(target)[name], use_lookup=True), parse_tree(6))
    assert isinstance(engine._heads, CapturedDrafter)
    plain = Engine(target, Proposer(), parse_tree(1))
    alone = [decode(plain, prompt, PARAMS).output_ids for prompt in PROMPTS]
    results, errors = [None] * len(PROMPTS), []

    def work(i):
        try:
            results[i] = decode(engine, PROMPTS[i], PARAMS).output_ids
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and results == alone


def test_drafts_of_threads_that_overtake_each_other(monkeypatch):
    """One is held up in the middle of feeding; the other feeds, drafts and grows the number of buffers."""
    target = static_target()
    drafter = real_drafters(target)["amphista-full"]
    around = CapturedDrafter(drafter)
    hidden = target.hidden_states(torch.tensor([list(range(3, 63))]))[0].clone()
    ids = torch.arange(4, 64)
    expected = []
    for start in (0, 20):
        state = drafter.start()
        for row in range(start, start + 20):
            drafter.commit(state, hidden[row : row + 1], ids[row : row + 1])
            expected.append(drafter.draft(state, 4).tokens)
    real, found = CapturedDrafter._take_buffers, {0: [], 20: []}

    def slow(self, state):
        time.sleep(0.0005)
        real(self, state)
        time.sleep(0.0005)

    monkeypatch.setattr(CapturedDrafter, "_take_buffers", slow)

    def work(start):
        state = around.start()
        for row in range(start, start + 20):
            around.commit(state, hidden[row : row + 1], ids[row : row + 1])
            time.sleep(0.0005)
            found[start].append(around.draft(state, 4).tokens)

    threads = [threading.Thread(target=work, args=(start,)) for start in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] + found[20] == expected


# -- rotary tables ----------------------------------------------------------------------------------------------------


def test_a_rotary_table_never_shrinks():
    """The one that asks for less is overtaken by the one that asks for more while it makes its table."""
    overtaken = threading.Event()

    def make(size):
        if size < 5000:
            overtaken.wait(0.2)
        return torch.zeros(size)

    table = RotaryTable(make)
    short = threading.Thread(target=lambda: table.reserve(100))
    short.start()
    time.sleep(0.02)
    assert len(table.reserve(4000)) >= 4000
    overtaken.set()
    short.join()
    assert len(table.table) >= 4000 and len(table.reserve(10)) >= 4000


def test_one_table_is_made_where_many_ask_at_once():
    made = []

    def make(size):
        made.append(size)
        time.sleep(0.02)
        return torch.zeros(size)

    table = RotaryTable(make)
    threads = [threading.Thread(target=lambda: table.reserve(3000)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [6000]
