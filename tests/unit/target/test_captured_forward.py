"""A recorded forward can be captured: it asks the host for nothing, and its buffers stay where they are."""

from __future__ import annotations

import weakref

import pytest
import torch

from amphista.cache.persistent import PersistentBuffer
from amphista.cache.static import KVCache
from amphista.errors import CaptureError
from amphista.kernels.graph import Recorder
from amphista.target import captured_forward
from amphista.target.captured_forward import VerifyRegion
from amphista.target.lean import LeanModel
from amphista.target.spans import Span
from amphista.target.target import Target
from amphista.tree.token_tree import TokenTree
from tests.capturable import buffers_of, capturable
from tests.tiny import tiny_model

FAMILIES = ["llama", "mistral-windowed", "qwen2-windowed", "qwen3"]


def static_target(family="llama", dtype=torch.float32, **changes):
    target = Target(tiny_model(family, dtype=dtype, **changes), static=True)
    assert target.speed_up() and target.is_static, target.why_not_captured
    return target


def binary(num_nodes):
    return TokenTree(list(range(num_nodes)), [-1, *((node - 1) // 2 for node in range(1, num_nodes))])


def regions_of(target):
    return {key: region for key, (region, _) in target._captured._regions._kept.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_nodes", [1, 7, 70])
def test_a_recorded_forward_asks_the_host_for_nothing(family, num_nodes, dtype):
    target = static_target(family, dtype)
    cache = target.new_cache()
    target.prefill(list(range(3, 14)), cache)
    target.verify(binary(num_nodes), cache)
    region = next(reversed(regions_of(target).values()))
    with capturable() as watch:
        region.run()
    assert len(watch.names) > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_it_touches_is_on_its_device(family):
    """On `meta`, which holds no values and joins no other device, as CUDA does not; bfloat16, as there."""
    meta = torch.device("meta")
    with meta:
        model = tiny_model(family, dtype=torch.bfloat16)
    model.requires_grad_(False)
    lean, spec = LeanModel(model), Target(tiny_model(family)).spec
    with torch.inference_mode():
        buffer = PersistentBuffer((spec.num_layers, spec.num_key_value_heads, spec.head_size), 64, torch.bfloat16, meta)
        region = VerifyRegion(lean, buffer, (8, spec.hidden_size, spec.vocab_size))
        region.run()
        assert region.logits.device == meta
        lean._heads_scale = torch.ones(lean._heads_scale.shape)
        with pytest.raises(RuntimeError, match="device"):
            region.run()


def test_what_the_watch_refuses():
    """Else the test above would prove nothing."""
    rows = torch.arange(6)
    for ask in (
        lambda: int(rows.max()),
        lambda: bool((rows > 1).all()),
        lambda: rows[rows > 2],
        lambda: rows.nonzero(),
        lambda: torch.tensor([1, 2]) + rows[:2],
        lambda: rows.tolist(),
        lambda: rows.cpu(),
    ):
        with pytest.raises(AssertionError, match="captured"), capturable():
            ask()


def test_the_forward_as_it_is_would_be_refused():
    target = static_target()
    spans = [Span(TokenTree([5], [-1]), KVCache(target.spec.num_layers))]
    with pytest.raises(AssertionError, match="captured"), capturable():
        target._lean.hidden_of(spans)


def test_buffers_stay(monkeypatch):
    monkeypatch.setattr(captured_forward, "FIRST_CAPACITY", 16)
    target = static_target()
    cache = target.new_cache()
    target.prefill([5, 6, 7], cache)
    addresses = {}
    for size in (1, 2, 3, 4, 7, 9, 20, 3, 2, 1, 7, 9):
        target.verify(binary(size), cache)
        cache.commit([0])
        for key, region in regions_of(target).items():
            assert addresses.setdefault(key, buffers_of(region)) == buffers_of(region)
    assert len(addresses) >= 6, "several sizes and capacities"


def test_the_rotary_table_a_forward_was_recorded_with_outlives_a_larger_table():
    target = static_target(max_position_embeddings=4096)
    cache = target.new_cache()
    target.prefill([5, 6, 7], cache)
    expected = target.verify(binary(3), cache).logits.clone()
    recorded = weakref.ref(target._lean.rotary.table)
    target._lean.rotary.reserve(3000)
    assert recorded() is not None and recorded() is not target._lean.rotary.table
    assert torch.equal(target.verify(binary(3), cache).logits, expected)


def test_few_buffers_and_forwards_are_kept(monkeypatch):
    """Capacities double; forwards beyond the limit are dropped, those used last stay."""
    monkeypatch.setattr(captured_forward, "FIRST_CAPACITY", 8)
    target = static_target()
    target._captured._regions._limit = 3
    cache = target.new_cache()
    target.prefill([5, 6, 7], cache)
    for step in range(60):
        target.verify(binary(1 + step % 5), cache)
        cache.commit([0])
    assert set(target._captured._buffers) == {8, 16, 32, 64, 128}
    assert len(target._captured._regions) == 3
    spec = target.spec
    row = 2 * spec.num_layers * spec.num_key_value_heads * spec.head_size * 4
    assert target._captured.num_bytes < 2 * 129 * row


def test_a_device_that_cannot_record_decodes_on_without(monkeypatch):
    """Said once, with the reason; the same cache goes on."""
    target = static_target()
    cache = target.new_cache()
    target.prefill([5, 6, 7], cache)
    expected = target.verify(binary(3), cache).logits.clone()
    cache.trim(3)

    def refuse(recorder, run):
        raise CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Recorder, "record", refuse)
    with pytest.warns(RuntimeWarning, match="decodes without captured graphs, slower: operation not permitted") as seen:
        target.verify(binary(9), cache)
        cache.trim(3)
        output = target.verify(binary(3), cache)
    assert len(seen) == 1 and output.choices is None
    cache.trim(3)
    torch.testing.assert_close(target.verify(binary(3), cache).logits, expected)
    assert target.path == "fast" and not target.is_static
    assert target.why_not_captured == "operation not permitted when stream is capturing"


def test_no_memory_for_a_larger_cache(monkeypatch):
    """What is kept for other sizes goes first; if that does not help, decoding goes on without."""
    target = static_target()
    real, calls = captured_forward.PersistentBuffer, []

    def short(*sizes):
        calls.append(sizes)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*sizes)

    cache = target.new_cache()
    target.prefill(list(range(3, 100)) * 3, cache)
    monkeypatch.setattr(captured_forward, "PersistentBuffer", short)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert target.verify(binary(3), cache).choices is not None and len(calls) == 2
    assert list(target._captured._buffers) == [512]

    def never(*sizes):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(captured_forward, "PersistentBuffer", never)
    other = target.new_cache()
    target.prefill([5], other)
    with pytest.warns(RuntimeWarning, match="no memory for a cache of 256 rows"):
        assert target.verify(binary(3), other).choices is None


def test_an_interrupted_forward_leaves_the_cache_as_it_was(monkeypatch):
    target = static_target()
    cache = target.new_cache()
    target.prefill([5, 6, 7], cache)
    expected = target.verify(binary(7), cache).logits.clone()
    cache.trim(3)

    def interrupt(region):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VerifyRegion, "run", interrupt)
        target._captured._regions.clear()
        target.verify(binary(7), cache)
    cache.check_integrity()
    assert cache.num_rows == 3
    target._captured._regions.clear()
    assert torch.equal(target.verify(binary(7), cache).logits, expected)


def test_by_default_only_where_there_is_cuda():
    target = Target(tiny_model())
    assert target.speed_up() and target.path == "fast" and not target.is_static and target.why_not_captured is None
