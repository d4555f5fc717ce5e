"""Rows at fixed addresses: who lives there, what moves, what a cache that grows leaves behind."""

from __future__ import annotations

import torch

from amphista.cache.resident import Residence, ResidentCache

LAYERS, HEADS, SIZE = 2, 3, 4


def residence(capacity=8):
    return Residence((LAYERS, HEADS, SIZE), capacity, torch.float32, torch.device("cpu"))


def filled(num_rows, start=0.0):
    """A cache whose row r holds start + r (values: its negative) in every layer, and a tenth more in the second."""
    cache = ResidentCache(LAYERS)
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
    home, cache = residence(), filled(3)
    home.move_in(cache)
    assert home.holds(cache) and rows_of(cache) == [0, 1, 2]
    append(cache, 2)
    assert home.holds(cache) and rows_of(cache) == [0, 1, 2, 3, 4]
    assert float(home.rows[0, 0, 0, 4, 0]) == 4, "it is written where it lives"
    cache.move_out()
    home.rows.fill_(99)
    assert not home.holds(cache) and cache.home is None and rows_of(cache) == [0, 1, 2, 3, 4]


def test_the_tenant_before_moves_out():
    home, first, second = residence(), filled(3), filled(2, start=50)
    home.move_in(first)
    home.move_in(second)
    assert home.holds(second) and not home.holds(first)
    assert rows_of(first) == [0, 1, 2] and rows_of(second) == [50, 51]
    home.move_in(first)
    assert rows_of(first) == [0, 1, 2] and rows_of(second) == [50, 51]


def test_a_tenant_that_moved_on_is_left_alone():
    small, large, first, second = residence(4), residence(8), filled(3), filled(2, start=50)
    small.move_in(first)
    large.move_in(first)
    small.move_in(second)
    assert large.holds(first) and small.holds(second)
    assert rows_of(first) == [0, 1, 2] and rows_of(second) == [50, 51]


def test_a_cache_that_outgrows_its_home_has_left():
    home, cache = residence(4), filled(3)
    home.move_in(cache)
    append(cache, 3)
    assert not home.holds(cache) and rows_of(cache) == [0, 1, 2, 3, 4, 5]
    other = filled(2, start=50)
    home.move_in(other)
    assert rows_of(cache) == [0, 1, 2, 3, 4, 5] and rows_of(other) == [50, 51]


def test_half_grown_is_made_whole_again():
    """A forward broken off between two layers: one has grown, the other not."""
    home, cache = residence(4), filled(3)
    home.move_in(cache)
    rows = torch.full((1, HEADS, 4, SIZE), 7.0)
    cache.layers[0].append(rows, -rows)
    cache.trim(3)
    assert not home.holds(cache)
    larger = residence(16)
    larger.move_in(cache)
    assert larger.holds(cache) and rows_of(cache) == [0, 1, 2]


def test_a_path_is_kept_in_all_layers_at_once():
    home, cache, plain = residence(16), filled(3), filled(3)
    home.move_in(cache)
    for each in (cache, plain):
        rows = torch.arange(10.0, 16.0)
        for index, layer in enumerate(each.layers):
            keys = (rows + 0.1 * index)[None, None, :, None].expand(1, HEADS, 6, SIZE)
            layer.append(keys, -keys)
        each.commit([0, 2, 3, 5])
        each.check_integrity()
    assert rows_of(cache) == rows_of(plain) == [0, 1, 2, 10, 12, 13, 15] and home.holds(cache)


def test_padding_writes_to_the_row_that_is_nobodys():
    home, cache = residence(8), filled(3)
    home.move_in(cache)
    slots = torch.tensor([3, 4, 8, 8])
    for layer in home.scattered(slots):
        keys, values = layer.append(torch.full((1, HEADS, 4, SIZE), 5.0), torch.full((1, HEADS, 4, SIZE), -5.0))
        assert keys.shape == values.shape == (1, HEADS, 9, SIZE)
    assert [float(row) for row in home.rows[0, 0, 0, :, 0]] == [0, 1, 2, 5, 5, 0, 0, 0, 5]
    assert rows_of(cache) == [0, 1, 2]
