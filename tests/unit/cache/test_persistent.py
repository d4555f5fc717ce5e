"""Rows at fixed addresses: who lives there, what moves, what a cache that grows leaves behind."""

from __future__ import annotations

import torch

from amphista.cache.persistent import BufferedCache, PersistentBuffer

LAYERS, HEADS, SIZE = 2, 3, 4


def new_buffer(capacity=8):
    return PersistentBuffer((LAYERS, HEADS, SIZE), capacity, torch.float32, torch.device("cpu"))


def filled(num_rows, start=0.0):
    """A cache whose row r holds start + r (values: its negative) in every layer, and a tenth more in the second."""
    cache = BufferedCache(LAYERS)
    append(cache, num_rows, start)
    return cache


def append(cache, num_rows, start=0.0):
    rows = torch.arange(num_rows, dtype=torch.float32) + start + cache.num_committed
    for index, layer in enumerate(cache.layers):
        keys = (rows + 0.1 * index)[None, None, :, None].expand(1, HEADS, num_rows, SIZE)
        layer.append(keys, -keys)
    cache.commit(range(num_rows))


def rows_of(cache):
    found = []
    for index, layer in enumerate(cache.layers):
        keys, values = (t[0, 0, : layer.num_rows, 0] for t in (layer.keys, layer.values))
        assert torch.equal(keys, -values)
        found.append([round(float(key) - 0.1 * index, 3) for key in keys])
    assert found[0] == found[1]
    return found[0]


def test_moving_keeps_the_rows_and_writing_goes_on_in_place():
    buffer, cache = new_buffer(), filled(3)
    buffer.attach(cache)
    assert buffer.holds(cache) and rows_of(cache) == [0, 1, 2]
    append(cache, 2)
    assert buffer.holds(cache) and rows_of(cache) == [0, 1, 2, 3, 4]
    assert float(buffer.rows[0, 0, 0, 4, 0]) == 4, "it is written where it lives"
    cache.detach()
    buffer.rows.fill_(99)
    assert not buffer.holds(cache) and cache.buffer is None and rows_of(cache) == [0, 1, 2, 3, 4]


def test_the_owner_before_is_detached():
    buffer, first, second = new_buffer(), filled(3), filled(2, start=50)
    buffer.attach(first)
    buffer.attach(second)
    assert buffer.holds(second) and not buffer.holds(first)
    assert rows_of(first) == [0, 1, 2] and rows_of(second) == [50, 51]
    buffer.attach(first)
    assert rows_of(first) == [0, 1, 2] and rows_of(second) == [50, 51]


def test_an_owner_that_moved_on_is_left_alone():
    small, large, first, second = new_buffer(4), new_buffer(8), filled(3), filled(2, start=50)
    small.attach(first)
    large.attach(first)
    small.attach(second)
    assert large.holds(first) and small.holds(second)
    assert rows_of(first) == [0, 1, 2] and rows_of(second) == [50, 51]


def test_a_cache_that_outgrows_its_buffer_has_left():
    buffer, cache = new_buffer(4), filled(3)
    buffer.attach(cache)
    append(cache, 3)
    assert not buffer.holds(cache) and rows_of(cache) == [0, 1, 2, 3, 4, 5]
    other = filled(2, start=50)
    buffer.attach(other)
    assert rows_of(cache) == [0, 1, 2, 3, 4, 5] and rows_of(other) == [50, 51]


def test_half_grown_is_made_whole_again():
    """A forward broken off between two layers: one has grown, the other not."""
    buffer, cache = new_buffer(4), filled(3)
    buffer.attach(cache)
    rows = torch.full((1, HEADS, 4, SIZE), 7.0)
    cache.layers[0].append(rows, -rows)
    cache.trim(3)
    assert not buffer.holds(cache)
    larger = new_buffer(16)
    larger.attach(cache)
    assert larger.holds(cache) and rows_of(cache) == [0, 1, 2]


def test_a_path_is_kept_in_all_layers_at_once():
    buffer, cache, plain = new_buffer(16), filled(3), filled(3)
    buffer.attach(cache)
    for each in (cache, plain):
        rows = torch.arange(10.0, 16.0)
        for index, layer in enumerate(each.layers):
            keys = (rows + 0.1 * index)[None, None, :, None].expand(1, HEADS, 6, SIZE)
            layer.append(keys, -keys)
        each.commit([0, 2, 3, 5])
        each.check_integrity()
    assert rows_of(cache) == rows_of(plain) == [0, 1, 2, 10, 12, 13, 15] and buffer.holds(cache)


def test_padding_writes_to_the_row_that_is_nobodys():
    buffer, cache = new_buffer(8), filled(3)
    buffer.attach(cache)
    slots = torch.tensor([3, 4, 8, 8])
    for layer in buffer.scattered(slots):
        keys, values = layer.append(torch.full((1, HEADS, 4, SIZE), 5.0), torch.full((1, HEADS, 4, SIZE), -5.0))
        assert keys.shape == values.shape == (1, HEADS, 9, SIZE)
    assert [float(row) for row in buffer.rows[0, 0, 0, :, 0]] == [0, 1, 2, 5, 5, 0, 0, 0, 5]
    assert rows_of(cache) == [0, 1, 2]
