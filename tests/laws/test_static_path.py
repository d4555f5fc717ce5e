"""Verifying in fixed shapes (target/captured_forward.py) equals the forward as it is and the stock model, padded too.

On CUDA these forwards are recorded as graphs; here the very same functions run as they are, on the same buffers
(`Target(static=True)`), and tests/gpu repeats the checks under capture. Float64, so that equality can be asked for to
1e-9 of the largest number, and float32 to 1e-5: products are added in another order.

Mutations (padding that leaks into the mask, rows committed from the wrong place, rows behind the end that are seen)
must be seen by the same checks.
"""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from amphista.cache.persistent import BufferedCache, PersistentBuffer
from amphista.cache.static import KVCache
from amphista.errors import CapacityError, TargetError
from amphista.target import captured_forward
from amphista.target.captured_forward import VerifyRegion
from amphista.target.spans import Span
from amphista.target.target import Target
from amphista.tree.token_tree import TokenTree
from tests.laws.test_fast_path import CHANGES, TREE, difference, prompt_of, shaken_model
from tests.tiny import WINDOW

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
DEEP = TokenTree(list(range(30, 46)), [-1, 0, 0, 0, *range(3, 15)])  # deeper than a window, and wide above
CAPACITY = 16  # the first one here: contexts of these tests cross several


@pytest.fixture(autouse=True)
def _small_capacities(monkeypatch):
    monkeypatch.setattr(captured_forward, "FIRST_CAPACITY", CAPACITY)


def static_target(name: str = "llama", dtype: torch.dtype = torch.float64, **kwargs) -> Target:
    family, changes = CHANGES[name]
    target = Target(shaken_model(family, **changes).to(dtype), name=name, static=True, **kwargs)
    assert target.speed_up() and target.is_static, target.why_not_captured
    assert target.path == "fast-static"
    return target


def as_it_is(target: Target) -> KVCache:
    """A cache that cannot live at fixed addresses: the same target verifies it as it is."""
    return KVCache(target.spec.num_layers)


def outputs_of(target: Target, cache: KVCache, length: int) -> list[torch.Tensor]:
    """A prefill, trees of several sizes, commits of scattered rows and trees behind them."""
    found = [target.prefill(prompt_of(length), cache).logits]
    for tree, path in (
        (TREE, [0, 2, 5]),
        (TREE, [0, 1]),
        (TokenTree([9], [-1]), [0]),
        (TokenTree([4, 5, 6], [-1, 0, 0]), [0, 2]),
        (TREE, [0, 1, 3, 6, 7, 8, 9]),
        (DEEP, [0, 3, 4]),
        (TREE, [0]),
    ):
        output = target.verify(tree, cache)
        found += [output.logits.clone(), output.hidden.clone()]
        cache.commit(path)
    cache.check_integrity()
    return found


def worst(target: Target, length: int, other: Target | None = None) -> float:
    cache = target.new_cache()
    assert isinstance(cache, BufferedCache)
    ours = outputs_of(target, cache, length)
    assert cache.buffer is not None, "nothing ran in fixed shapes: the law would be vacuous"
    other = other or target
    theirs = outputs_of(other, as_it_is(other), length)
    return max(difference(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_equals_the_same_forward_as_it_is_and_the_stock_model(name, dtype):
    target = static_target(name, dtype)
    stock = Target(target.model, name="stock")
    assert stock.path == "stock"
    for length in (1, WINDOW, 3 * WINDOW + 1):
        assert worst(target, length) < TOLERANCE[dtype]
        assert worst(target, length, stock) < 1e-5  # whose norms are of float32, whatever its weights are


@pytest.mark.parametrize("name", ["llama", "mistral-windowed", "qwen2-windowed", "qwen3"])
@pytest.mark.parametrize("num_nodes", [2, 3, 5, 9, 17, 33, 65, 100, 256])
def test_every_bucket_and_what_is_beyond_one_word_of_bits(name, num_nodes):
    target = static_target(name)
    tree = TokenTree(
        [node % 290 for node in range(num_nodes)], [-1, *((node - 1) // 2 for node in range(1, num_nodes))]
    )
    outputs = []
    for cache in (target.new_cache(), as_it_is(target)):
        target.prefill(prompt_of(11), cache)
        outputs.append(target.verify(tree, cache))
    assert difference(outputs[0].logits, outputs[1].logits) < 1e-9
    assert outputs[0].choices == outputs[1].logits.argmax(-1).tolist() and outputs[1].choices is None


@pytest.mark.parametrize("name", ["llama", "mistral-windowed", "qwen2-windowed"])
def test_padding_changes_nothing(name, monkeypatch):
    """The same trees in buckets of their own size and in one far too large: logits, and every row that is kept."""
    rows, logits = [], []
    for sizes in ((1, 2, 3, 10, 16), (256,)):
        monkeypatch.setattr(captured_forward, "NODES", sizes)
        target = static_target(name)
        cache = target.new_cache()
        logits.append(outputs_of(target, cache, 9))
        rows.append(cache.buffer.rows[:, :, :, : cache.num_committed].clone())
    assert max(difference(a, b) for a, b in zip(*logits, strict=True)) < 1e-9
    assert difference(*rows) < 1e-9


def test_a_tree_beyond_the_largest_bucket_is_read_as_it_is():
    target = static_target()
    tree = TokenTree(list(range(270)), [-1, *((node - 1) // 2 for node in range(1, 270))])
    cache, other = target.new_cache(), as_it_is(target)
    target.prefill(prompt_of(9), cache), target.prefill(prompt_of(9), other)
    output = target.verify(tree, cache)
    assert output.choices is None and difference(output.logits, target.verify(tree, other).logits) < 1e-12
    cache.commit([0, 1, 3]), other.commit([0, 1, 3])
    assert difference(target.verify(TREE, cache).logits, target.verify(TREE, other).logits) < 1e-9


@pytest.mark.parametrize("name", ["llama", "mistral-windowed", "qwen2-windowed"])
def test_a_tree_is_its_paths(name):
    target = static_target(name)
    cache = target.new_cache()
    target.prefill(prompt_of(13), cache)
    whole = target.verify(TREE, cache).logits.clone()
    for node in range(TREE.num_nodes):
        cache.trim(13)
        path = TREE.path(node)
        chain = TokenTree([TREE.tokens[i] for i in path], list(range(-1, len(path) - 1)))
        assert difference(target.verify(chain, cache).logits, whole[path]) < 1e-9


def test_commit_equals_prefill():
    """Rows and what is seen behind them, over several steps, against the committed tokens read at once."""
    target = static_target("qwen3")
    cache, tokens = target.new_cache(), prompt_of(7)
    target.prefill(tokens, cache)
    for path in ([0, 2, 5], [0], [0, 1, 3, 6], [0, 2], [0, 1, 4]):
        target.verify(TREE, cache)
        cache.commit(path)
        tokens = tokens + [TREE.tokens[node] for node in path]
        assert cache.buffer.holds(cache)
    fresh = as_it_is(target)
    target.prefill(tokens, fresh)
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        rows = theirs.num_rows
        assert ours.num_rows == rows
        torch.testing.assert_close(ours.keys[:, :, :rows], theirs.keys[:, :, :rows], atol=1e-9, rtol=0)
        torch.testing.assert_close(ours.values[:, :, :rows], theirs.values[:, :, :rows], atol=1e-9, rtol=0)


def test_capacities_are_crossed_on_the_way():
    """From 16 rows over 32 and 64 to 128, by trees, by a prefill in the buffer, and back after a trim."""
    target = static_target("mistral-windowed")
    cache, other = target.new_cache(), as_it_is(target)
    seen = set()
    target.prefill(prompt_of(5), cache), target.prefill(prompt_of(5), other)
    for step in range(20):
        if step == 12:
            assert (
                difference(target.prefill(prompt_of(30), cache).logits, target.prefill(prompt_of(30), other).logits)
                < 1e-9
            )
        if step == 16:
            cache.trim(6), other.trim(6)
        assert difference(target.verify(TREE, cache).logits, target.verify(TREE, other).logits) < 1e-9
        seen.add(cache.buffer.capacity)
        cache.commit([0, 2, 5]), other.commit([0, 2, 5])
    assert seen == {16, 32, 64, 128}


def test_up_to_the_last_position_of_the_context():
    target = Target(shaken_model("llama", max_position_embeddings=24).double(), static=True)
    assert target.speed_up() and target.is_static
    cache, other = target.new_cache(), as_it_is(target)
    target.prefill(prompt_of(20), cache), target.prefill(prompt_of(20), other)
    wide = TokenTree(list(range(40)), [-1] + [0] * 36 + [1, 37, 2])  # the deepest node stands at position 23
    assert difference(target.verify(wide, cache).logits, target.verify(wide, other).logits) < 1e-9
    with pytest.raises(CapacityError, match="position 24 is beyond"):
        target.verify(TokenTree([1, 2, 3, 4, 5], [-1, 0, 1, 2, 3]), cache)


def test_caches_take_turns():
    """One lives at fixed addresses at a time; what moves out and in again has kept its rows."""
    target = static_target("qwen2")
    pairs = []
    for length in (3, 9, 20):
        pairs.append((target.new_cache(), as_it_is(target)))
        for cache in pairs[-1]:
            target.prefill(prompt_of(length), cache)
    for step in range(4):
        for ours, theirs in pairs:
            assert difference(target.verify(TREE, ours).logits, target.verify(TREE, theirs).logits) < 1e-9
        for ours, theirs in pairs:  # committed when another has moved in since
            ours.commit([0, 1, 4][: step + 1]), theirs.commit([0, 1, 4][: step + 1])
    assert sum(ours.buffer is not None and ours.buffer.holds(ours) for ours, _ in pairs) < 3


def test_a_ragged_batch_is_read_as_it_is():
    """Caches that live at fixed addresses move out, and in again."""
    target, plain = static_target("qwen2-windowed"), Target(shaken_model("qwen2-windowed").double())
    assert plain.speed_up()
    outputs = []
    for each in (target, plain):
        caches = [each.new_cache() for _ in range(3)]
        for cache, length in zip(caches, (3, WINDOW + 2, 1), strict=True):
            each.prefill(prompt_of(length), cache)
        outputs.append([])
        for step in range(3):
            outputs[-1].append(each.verify(TREE, caches[step]).logits.clone())
            caches[step].commit([0, 1])
            together = each.forward([Span(TokenTree([40 + step], [-1]), cache) for cache in caches])
            outputs[-1] += [output.logits for output in together]
            for cache in caches:
                cache.commit([0])
    assert all(difference(a, b) < 1e-12 for a, b in zip(*outputs, strict=True))


def test_weights_of_8_bits_are_refused():
    with pytest.raises(TargetError, match="need the C step"):
        Target(shaken_model("qwen3"), static=True).speed_up(int8=True, native=True)


def test_a_cache_nobody_holds_any_more_is_not_kept():
    target = static_target()
    cache = target.new_cache()
    target.prefill(prompt_of(4), cache), target.verify(TREE, cache)
    buffer = cache.buffer
    del cache
    gc.collect()
    assert buffer._owner() is None


def test_another_thread_decodes_as_it_is():
    target = static_target()
    mine = target.new_cache()
    target.prefill(prompt_of(9), mine)
    target.verify(TREE, mine)
    mine.commit([0, 2])
    found = []

    def decode():
        cache = target.new_cache()
        target.prefill(prompt_of(9), cache)
        found.append(target.verify(TREE, cache))
        found.append(cache.buffer)
        found.append(target.verify(TREE, mine))  # it may also go on with a cache that lives here
        found.append(mine.buffer)

    thread = threading.Thread(target=decode)
    thread.start(), thread.join()
    other = as_it_is(target)
    target.prefill(prompt_of(9), other)
    assert difference(found[0].logits, target.verify(TREE, other).logits) < 1e-12
    other.commit([0, 2])
    assert difference(found[2].logits, target.verify(TREE, other).logits) < 1e-9
    assert found[1] is None and found[3] is None


# -- what must not pass -----------------------------------------------------------------------------------------------


def _padding_is_seen(monkeypatch):
    """Padded nodes follow the tree's own in the cache and every node sees them."""
    original = VerifyRegion._visible

    def leaky(region):
        visible, positions = original(region)
        return visible | (region._columns == region._scratch), positions

    monkeypatch.setattr(VerifyRegion, "_visible", leaky)


def _stale_rows_are_seen(monkeypatch):
    original = VerifyRegion._visible

    def leaky(region):
        visible, positions = original(region)
        behind = (region._columns >= region.num_past + region.num_nodes) & (region._columns < region._scratch)
        return visible | behind, positions

    monkeypatch.setattr(VerifyRegion, "_visible", leaky)


def _siblings_are_seen(monkeypatch):
    monkeypatch.setattr(TokenTree, "ancestor_bits", lambda tree: [(1 << i + 1) - 1 for i in range(tree.num_nodes)])


def _wrong_commit_row(monkeypatch):
    original = BufferedCache._move
    monkeypatch.setattr(BufferedCache, "_move", lambda cache, rows, to: original(cache, [row - 1 for row in rows], to))


def _written_one_late(monkeypatch):
    original = VerifyRegion.load

    def late(region, tree, num_past):
        original(region, tree, num_past)
        region.slots[: tree.num_nodes] += 1

    monkeypatch.setattr(VerifyRegion, "load", late)


def _window_by_rows(monkeypatch):
    original = VerifyRegion._visible
    monkeypatch.setattr(VerifyRegion, "_visible", lambda region: (original(region)[0], region._columns))


def _padding_written_among_the_rows(monkeypatch):
    """Instead of to the row that is nobody's: over the last committed one."""
    original = VerifyRegion.load

    def load(region, tree, num_past):
        original(region, tree, num_past)
        region.slots[tree.num_nodes :] = num_past - 1

    monkeypatch.setattr(VerifyRegion, "load", load)


def _not_moved_in(monkeypatch):
    def pretend(buffer, cache):
        cache.buffer = buffer
        for layer, (keys, values) in zip(cache.layers, buffer.views, strict=True):
            layer.keys, layer.values = keys, values

    monkeypatch.setattr(PersistentBuffer, "attach", pretend)


@pytest.mark.parametrize(
    "mutation",
    [
        _padding_is_seen,
        _stale_rows_are_seen,
        _siblings_are_seen,
        _wrong_commit_row,
        _written_one_late,
        _window_by_rows,
        _padding_written_among_the_rows,
        _not_moved_in,
    ],
)
def test_a_mutation_is_seen(mutation, monkeypatch):
    target = static_target("mistral-windowed")
    with monkeypatch.context() as patch:
        mutation(patch)
        assert worst(target, 11) > 1e-4
    assert worst(target, 11) < 1e-9


def test_a_recorded_forward_that_differs_is_not_used(monkeypatch):
    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="without captured graphs.*differs"):
        _siblings_are_seen(patch)
        target = Target(shaken_model("llama").double(), static=True)
        assert target.speed_up() and not target.is_static
    assert target.path == "fast" and "differs" in target.why_not_captured
    assert type(target.new_cache()) is KVCache
