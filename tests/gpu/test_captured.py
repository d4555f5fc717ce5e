"""Forwards and drafts captured as CUDA graphs: equal to the same ones as they are and to the stock model, lossless, and
replayed without a wait for the device. The laws themselves are in tests/laws/test_static_*.py, where the same functions
run on a CPU; these need a GPU:

pytest tests/gpu
"""

from __future__ import annotations

import warnings

import pytest
import torch

from amphista.cache.static import KVCache
from amphista.drafter import captured_drafter as drafting
from amphista.drafter.base import Drafter
from amphista.drafter.captured_drafter import CapturedDrafter
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.errors import CaptureError
from amphista.kernels.graph import WARM_UPS, Recorder
from amphista.target import captured_forward as verifying
from amphista.target.target import Target
from amphista.tree.grow import parse_tree
from amphista.tree.token_tree import TokenTree
from tests.capturable import buffers_of
from tests.decoding import decode
from tests.laws.test_fast_path import CHANGES, difference, prompt_of, shaken_model
from tests.laws.test_static_path import DEEP, outputs_of
from tests.tiny import AUTO_TREES, HOSTILE, REAL_DRAFTERS, WINDOW, real_drafters, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 0.3,
}  # of the largest number; random weights amplify
PROMPT = [5, 17, 230, 44, 9]
TREES = {"9": parse_tree(9), "chain": parse_tree("chain"), **AUTO_TREES}
SAMPLINGS = {
    "greedy": SamplingParams(max_new_tokens=24),
    "sampled": SamplingParams(max_new_tokens=24, temperature=0.7, seed=3),
    "penalised": SamplingParams(max_new_tokens=24, repetition_penalty=1.5),
}


@pytest.fixture(autouse=True)
def _small_capacities(monkeypatch):
    monkeypatch.setattr(verifying, "FIRST_CAPACITY", 16)
    monkeypatch.setattr(drafting, "FIRST_CAPACITY", 8)


def on_gpu(model, **settings) -> Target:
    target = Target(model.cuda(), **settings)
    assert target.speed_up(), target.why_stock
    return target


def captured_target(name="llama", dtype=torch.float64) -> Target:
    family, changes = CHANGES[name]
    target = on_gpu(shaken_model(family, **changes).to(dtype), name=name)
    assert target.path == "captured", target.why_not_captured
    return target


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_equals_the_same_forward_as_it_is_and_the_stock_model(name, dtype):
    target = captured_target(name, dtype)
    stock = Target(target.model, name="stock")
    for length in (1, WINDOW, 3 * WINDOW + 1):
        cache = target.new_cache()
        ours = outputs_of(target, cache, length)
        assert cache.buffer is not None and cache.buffer.holds(cache)
        as_it_is = outputs_of(target, KVCache(target.spec.num_layers), length)
        theirs = outputs_of(stock, KVCache(target.spec.num_layers), length)
        assert max(difference(a.double(), b.double()) for a, b in zip(ours, as_it_is, strict=True)) < TOLERANCE[dtype]
        stock_tolerance = max(TOLERANCE[dtype], 1e-4)  # whose norms are of float32, whatever its weights are
        assert max(difference(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)) < stock_tolerance


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 9, 33, 65, 100, 256])
def test_every_bucket(num_nodes):
    target = captured_target("mistral-windowed")
    tree = TokenTree(
        [node % 290 for node in range(num_nodes)], [-1, *((node - 1) // 2 for node in range(1, num_nodes))]
    )
    outputs = []
    for cache in (target.new_cache(), KVCache(target.spec.num_layers)):
        target.prefill(prompt_of(11), cache)
        outputs.append(target.verify(tree, cache))
    assert difference(outputs[0].logits, outputs[1].logits) < 1e-9
    assert outputs[0].choices == outputs[1].logits.argmax(-1).tolist()


def test_a_replay_waits_for_nothing_and_its_buffers_stay():
    target = captured_target()
    cache = target.new_cache()
    target.prefill(prompt_of(9), cache)
    target.verify(DEEP, cache)
    (region, replay) = next(reversed(target._captured._regions._kept.values()))
    before = buffers_of(region)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            replay(), replay()
            region.run()  # nor does the function that was captured
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert buffers_of(region) == before


def test_old_graphs_still_serve_after_larger_ones():
    """They share memory: whatever order they are replayed in, each gives what it gave."""
    target = captured_target("qwen3")
    found = {}
    for size in (1, 8, 40, 3, 100, 1, 8, 40, 3, 100, 100, 3, 40, 8, 1):
        cache = target.new_cache()
        target.prefill(prompt_of(9), cache)
        tree = TokenTree([node % 290 for node in range(size)], [-1, *((node - 1) // 2 for node in range(1, size))])
        logits = target.verify(tree, cache).logits.clone()
        assert torch.equal(found.setdefault(size, logits), logits)


def is_captured(name):
    """Whether this drafter's heads are drawn in fixed shapes: those asked all at once, from rows of their own."""
    return name.startswith(("amphista", "medusa"))


@pytest.fixture(scope="module")
def target():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifying, "FIRST_CAPACITY", 16)
        return on_gpu(tiny_model().double())


@pytest.fixture(scope="module")
def expected(target):
    """What the stock model decodes without drafts, on the same device."""
    stock = Target(target.model)
    plain = real_drafters(stock)["none"]
    return {
        name: decode(Engine(stock, plain, parse_tree(1)), PROMPT, params).output_ids
        for name, params in SAMPLINGS.items()
    }


@pytest.fixture(scope="module")
def drafters(target):
    drafters = real_drafters(target)
    for drafter in drafters.values():
        if isinstance(drafter, Drafter):
            drafter.to(target.device)  # those beside lookup are the same
    return drafters


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_drafters(target, expected, name, tree, sampling):
    drafter = HOSTILE[name](PROMPT + expected[sampling])
    sequence = decode(Engine(target, drafter, TREES[tree]), PROMPT, SAMPLINGS[sampling])
    assert sequence.output_ids == expected[sampling]
    if name == "always-right" and tree == "chain":
        assert set(sequence.stats.accepted[:-1]) == {4}


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", REAL_DRAFTERS)
def test_real_drafters(target, drafters, expected, name, tree, sampling):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a drafter that cannot be captured says so
        engine = Engine(target, drafters[name], TREES[tree])
        sequence = decode(engine, PROMPT, SAMPLINGS[sampling])
    assert sequence.output_ids == expected[sampling]
    assert isinstance(engine._heads, CapturedDrafter) == is_captured(name)


@pytest.mark.parametrize("name", [name for name in REAL_DRAFTERS if is_captured(name) and "+" not in name])
def test_the_same_candidates(target, drafters, name):
    around, drafter = CapturedDrafter(drafters[name]), drafters[name]
    ours, theirs = drafter.start(), drafter.start()
    width = target.spec.row_width(drafter.taps)
    hidden = torch.randn(60, width, dtype=target.dtype, device=target.device)
    ids = torch.arange(60, device=target.device)
    at = 0
    for size, keep in ((1, 99), (5, 99), (3, 7), (2, 99), (33, 20), (1, 99), (4, 3), (9, 99)):
        for each, state in ((around, ours), (drafter, theirs)):
            each.commit(state, hidden[at : at + size], ids[at : at + size])
        mine, other = around.draft(ours, 6), drafter.draft(theirs, 6)
        assert mine.tokens == other.tokens
        at = (at + size) % 20
        if keep < 99:
            around.trim(ours, keep), drafter.trim(theirs, keep)
    assert around.why_not_captured is None


def test_out_of_memory_in_a_capture_is_said_and_survived(monkeypatch):
    target = captured_target()
    cache = target.new_cache()
    target.prefill(prompt_of(9), cache)
    first = target.verify(DEEP, cache).logits.clone()
    cache.trim(9)

    def greedy_run(recorder, run, original=Recorder._capture):
        def too_much():
            run()
            torch.empty(1 << 50, device=target.device)

        return original(recorder, too_much)

    monkeypatch.setattr(Recorder, "_capture", greedy_run)
    with pytest.warns(RuntimeWarning, match="decodes without captured graphs, slower"):
        target.verify(TokenTree([3], [-1]), cache)
    cache.trim(9)
    assert target.path == "fast"
    assert difference(target.verify(DEEP, cache).logits, first) < 1e-9
    torch.cuda.synchronize()


def test_a_capture_that_asks_the_device_is_refused_and_survived():
    recorder, rows = Recorder(torch.device("cuda")), torch.arange(6, device="cuda")
    with pytest.raises(CaptureError):
        recorder.record(lambda: int(rows.max()))
    torch.cuda.synchronize()
    count = torch.zeros(1, device="cuda")
    replay = Recorder(torch.device("cuda")).record(lambda: count.add_(1))
    before = float(count)  # warming up has counted, capturing has not
    replay(), replay()
    assert float(count) == before + 2 == WARM_UPS + 2
