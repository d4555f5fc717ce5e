"""Limits: the work of a forward is what its modules do; the bound is the larger of reading and computing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gguf import GGMLQuantizationType
from torch.utils.flop_counter import FlopCounterMode

from amphista.evaluation.latency import typical_tree
from amphista.target import gguf as files
from amphista.target.loading import load_target
from amphista.target.target import Target
from benchmarks.lab import limits as limits_module
from benchmarks.lab.limits import (
    READ_ROWS,
    ForwardWork,
    Limits,
    computing_ways,
    measure_limits,
    own_product,
    reading_ways,
)
from tests.gguf_file import write_gguf
from tests.tiny import VOCAB, tiny_model, tiny_target


@pytest.mark.parametrize("tied", [True, False])
def test_operations_on_weights_are_those_a_counter_sees(tied):
    model = tiny_model(tie_word_embeddings=tied)
    target = Target(model, name="counted")
    cache, nodes = target.new_cache(), 8
    target.prefill([1, 2, 3], cache)
    with FlopCounterMode(display=False) as counter:  # it sees matrix products, attention's not among them
        target.verify(typical_tree(VOCAB, nodes), cache)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # norms: read, but no products
    counted = ForwardWork.of(target).num_operations(1, 0, nodes)
    assert 0 <= 2 * nodes * vectors - (counted - counter.get_total_flops()) < 2 * nodes * target.spec.num_layers


def test_operations_on_cached_rows_are_a_product_with_keys_and_one_with_values():
    target = tiny_target()
    spec, work = target.spec, ForwardWork.of(target)
    rows, nodes = 24, 8
    by_hand = spec.num_layers * spec.num_attention_heads * (2 * nodes * rows * spec.head_size) * 2
    assert work.num_operations(1, rows, nodes) - work.num_operations(1, 0, nodes) == by_hand


def test_bytes_are_every_weight_but_the_embedding_rows_and_the_context_once():
    target = Target(tiny_model(tie_word_embeddings=False), name="untied")
    weights = sum(p.numel() for p in target.model.parameters())
    embedding = target.model.get_input_embeddings().weight.numel()
    work = ForwardWork.of(target)
    assert weights - embedding - work.weights < target.spec.num_layers  # shared evenly among the layers
    assert work.num_bytes(1, 0) == 4 * work.weights
    cache = target.new_cache()
    target.prefill([1, 2, 3], cache)
    held = sum(layer.keys[..., :3, :].numel() + layer.values[..., :3, :].numel() for layer in cache.layers)
    assert work.num_bytes(2, 3) - work.num_bytes(2, 0) == 4 * 2 * held


def test_the_bound_is_memory_for_one_node_and_arithmetic_for_many():
    work = ForwardWork(weights=1000, row_values=10, attention_width=5, itemsize=4)
    limits = Limits(bytes_per_second=4000.0, operations_per_second=20000.0)
    assert work.least_ms(limits, batch=1, context=0, nodes=1) == 1000.0
    assert work.least_ms(limits, batch=1, context=0, nodes=100) == 10_000.0
    assert work.least_ms(limits, batch=1, context=100, nodes=1) == 2000.0


def test_layers_that_are_not_there_count():
    target = tiny_target()
    whole, twice = ForwardWork.of(target), ForwardWork.of(target, 2 * target.spec.num_layers)
    head = target.spec.vocab_size * target.spec.hidden_size
    assert twice.weights - head == 2 * (whole.weights - head) and twice.row_values == 2 * whole.row_values


@pytest.fixture
def small(monkeypatch):
    """Nothing far beyond a cache here: only what is done is looked at, not how long it takes."""
    monkeypatch.setattr(limits_module, "READ_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(limits_module, "MATRIX_SIZE", {"cpu": 64})


def test_measured_rates_are_positive(small):
    limits = measure_limits(tiny_target(dtype=torch.float64))
    assert limits.bytes_per_second > 0 and limits.operations_per_second > 0


def test_a_limit_is_never_below_what_a_product_of_the_target_reaches(small, monkeypatch):
    """The best of all ways counts, and the target's own products over few and over many rows are among them."""
    target = tiny_target()
    reading, computing = reading_ways(target), computing_ways(target)
    products = [f"product over {count} row{'s' * (count > 1)}" for count in READ_ROWS]
    assert set(products) < set(reading) and "own product over 64 rows" in computing
    weight = own_product(target, (1 << 16) // (4 * target.spec.hidden_size), target.spec.hidden_size)
    assert all(reading[name][0] == weight.num_bytes for name in products)
    assert computing["own product over 64 rows"][0] == 2 * 64**3
    for slow in [*reading, *computing]:  # whichever takes least time per byte or operation is the limit
        fast = dict.fromkeys([*reading, *computing], 2.0) | {slow: 0.001}
        seconds = iter([fast[name] for name in [*reading, *computing]])
        monkeypatch.setattr(limits_module, "seconds_of", lambda target, work, seconds=seconds: next(seconds))
        found = measure_limits(target)
        assert slow in (found.read_by, found.computed_by)
        best = max(reading[name][0] / fast[name] for name in reading)
        assert found.bytes_per_second == best >= max(reading[name][0] / fast[name] for name in products)


def test_each_way_does_what_it_counts(small):
    target = tiny_target()
    for amount, work in [*reading_ways(target).values(), *computing_ways(target).values()]:
        with torch.inference_mode():
            work()
        assert amount > 0


def test_blocks_are_read_at_their_own_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path)
    path = write_gguf(tmp_path / "tiny.gguf", lambda name: GGMLQuantizationType.Q8_0)
    work = ForwardWork.of(load_target(str(path), dtype="gguf"))
    assert work.num_bytes(1, 0) == pytest.approx(work.weights * 34 / 32, rel=0.1)  # packed or not


def test_weights_of_8_bits_are_read_at_a_byte_each():
    wide = ForwardWork(weights=1000, row_values=10, attention_width=5, itemsize=4)
    narrow = dataclasses.replace(wide, weight_size=1)
    assert wide.num_bytes(2, 3) - narrow.num_bytes(2, 3) == 3 * 1000
    assert narrow.num_operations(2, 3, 4) == wide.num_operations(2, 3, 4)


def test_an_int8_target_is_held_against_its_own_kernel(small):
    target = tiny_target("llama")
    assert target.speed_up(int8=True, native=True) and ForwardWork.of(target).weight_size == 1
    assert measure_limits(target).operations_per_second > 0
    assert "square product" not in computing_ways(target)
