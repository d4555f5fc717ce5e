from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
import torch

from amphista.cache.static import FIRST_CAPACITY, KVCache, LayerRows
from amphista.errors import CapacityError
from amphista.native import huge_pages
from amphista.native.huge_pages import PAGE_BYTES, Pool

HEADS, SIZE = 2, 3


def rows(numbers):
    """Keys that carry their number, values that carry its negative, different per head."""
    keys = torch.tensor(numbers, dtype=torch.float32)[None, None, :, None].expand(1, HEADS, len(numbers), SIZE)
    keys = keys + torch.arange(HEADS)[None, :, None, None] * 0.5
    return keys, -keys


def append(cache, numbers):
    for layer in cache.layers:
        seen = layer.append(*rows(numbers))
    return seen


def held(cache):
    """The numbers in each layer, keys and values checked against each other."""
    found = []
    for layer in cache.layers:
        keys, values = layer.keys[:, :, : layer.num_rows], layer.values[:, :, : layer.num_rows]
        assert torch.equal(keys, -values)
        assert torch.equal(keys[:, 1], keys[:, 0] + 0.5)
        found.append(keys[0, 0, :, 0].tolist())
    assert all(numbers == found[0] for numbers in found)
    return found[0]


@pytest.mark.parametrize("seed", range(5))
def test_random_steps_equal_a_plain_list(seed):
    source = random.Random(seed)
    cache, expected, number = KVCache(3), [], 0
    for _ in range(60):
        tree = list(range(number, number + source.randrange(1, 20)))
        number += len(tree)
        append(cache, tree)
        assert held(cache) == expected + tree
        path = sorted(source.sample(range(len(tree)), source.randrange(1, len(tree) + 1)))
        cache.commit(path)
        expected += [tree[node] for node in path]
        if source.random() < 0.1:
            keep = source.randrange(len(expected) + 1)
            cache.trim(keep)
            expected = expected[:keep]
        assert held(cache) == expected and cache.num_committed == cache.num_rows == len(expected)
        cache.check_integrity()


def test_append_returns_all_rows():
    cache = KVCache(1)
    append(cache, [1, 2])
    cache.commit([0, 1])
    keys, values = append(cache, [3])
    assert keys[0, 0, :, 0].tolist() == [1, 2, 3] and torch.equal(values, -keys)


def test_growth_is_geometric_and_the_same_for_keys_and_values():
    layer, capacities = LayerRows(), []
    assert layer.capacity == 0
    for number in range(2000):
        layer.append(*rows([number]))
        assert layer.keys.shape == layer.values.shape
        if layer.capacity not in capacities:
            capacities.append(layer.capacity)
    assert capacities[0] == FIRST_CAPACITY
    assert all(new == int(old * 1.5) for old, new in itertools.pairwise(capacities))
    assert layer.keys[0, 0, :2000, 0].tolist() == list(range(2000))


def test_one_large_append_takes_no_more_than_it_needs():
    layer = LayerRows()
    layer.append(*rows(range(1000)))
    assert layer.capacity == 1000


def test_bytes():
    cache = KVCache(2)
    assert cache.num_bytes == 0
    append(cache, [1])
    assert cache.num_bytes == 2 * 2 * FIRST_CAPACITY * HEADS * SIZE * 4


@pytest.mark.parametrize("path", [[1, 0], [0, 0], [3], [-1], [0, 1, 2, 3]])
def test_a_path_that_is_not_in_the_tree_is_refused_and_changes_nothing(path):
    cache = KVCache(2)
    append(cache, [8, 9])
    cache.commit([0, 1])
    append(cache, [1, 2, 3])
    with pytest.raises(CapacityError, match="cannot commit path"):
        cache.commit(path)
    assert held(cache) == [8, 9, 1, 2, 3] and cache.num_committed == 2


def test_trim_drops_an_uncommitted_tree():
    cache = KVCache(2)
    append(cache, [8, 9])
    cache.commit([0, 1])
    append(cache, [1, 2, 3])
    cache.trim(2)
    assert held(cache) == [8, 9]
    cache.trim(0)
    assert held(cache) == [] and cache.num_committed == 0


@pytest.mark.parametrize("num_rows", [-1, 3])
def test_trim_beyond_the_committed_rows_is_refused(num_rows):
    cache = KVCache(2)
    append(cache, [8, 9, 7])
    cache.commit([0, 1])
    with pytest.raises(CapacityError, match="cannot trim"):
        cache.trim(num_rows)


def test_integrity_notices_layers_that_disagree():
    cache = KVCache(2)
    append(cache, [8, 9])
    cache.check_integrity()
    cache.layers[1].num_rows = 1
    with pytest.raises(CapacityError, match="disagree"):
        cache.check_integrity()


def test_integrity_notices_committed_rows_that_are_not_there():
    cache = KVCache(2)
    append(cache, [8, 9])
    cache.num_committed = 3
    with pytest.raises(CapacityError, match="3 committed"):
        cache.check_integrity()


def test_one_piece_holds_what_every_layer_held_however_they_grew():
    """The layers' own growth may be broken off between two of them; paths move the same rows in either form."""
    whole, plain = KVCache(3), KVCache(3)
    row, size = torch.zeros(1, 2, 0, 4), FIRST_CAPACITY
    for turn in range(3):
        start = plain.num_committed
        for layer, other in zip(whole.layers, plain.layers, strict=True):
            keys, values = torch.randn(2, 1, 2, size, 4)
            layer.append(keys, values)
            other.append(keys, values)
        whole.layers[0].make_room(start + 2 * size, row, row)  # only the first has grown
        piece = whole.in_one_piece(start + size + 1, row)
        assert piece.shape[0] == 6 and piece is whole.in_one_piece(1, row)
        path = list(range(turn, size, 2))
        whole.commit(path)
        plain.commit(path)
        for n, (layer, other) in enumerate(zip(whole.layers, plain.layers, strict=True)):
            end = plain.num_committed
            for mine, its, at in ((layer.keys, other.keys, n), (layer.values, other.values, 3 + n)):
                assert torch.equal(mine[:, :, :end], its[:, :, :end])
                assert mine.data_ptr() == piece[at].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_piece_fills_pages_of_its_own(dtype):
    """A step reads all of it: in huge pages, which begin where 2 MB do, looking them up takes less."""
    cache, row = KVCache(8), torch.zeros(1, 2, 0, 64, dtype=dtype)
    for num_rows in (PAGE_BYTES // 2048, PAGE_BYTES // 1024):
        piece = cache.in_one_piece(num_rows, row)
        assert piece.data_ptr() % PAGE_BYTES == 0 and piece.dtype is dtype
        assert piece.shape[:2] == (16, 2) and piece.shape[2] >= num_rows and piece.is_contiguous()


ROW = torch.zeros(1, 2, 0, 64)
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def filled(num_rows: int, value: float) -> torch.Tensor:
    """A piece for so many rows; 4 KB each."""
    return KVCache(4).in_one_piece(num_rows, ROW).fill_(value)


def test_what_nobody_holds_any_more_is_used_again():
    size = PAGE_BYTES // 1024
    first = filled(size, 1.0)
    place, view = first.data_ptr(), first[3:4]
    del first
    second = filled(size, 2.0)
    assert second.data_ptr() != place and (view == 1).all()
    del view
    third = filled(size - 20, 3.0)
    assert third.data_ptr() == place and (second == 2).all()


def test_only_what_is_used_again_is_in_huge_pages():
    """As the system tells, where it has them."""
    if not HUGE.is_file() or "[madvise]" not in HUGE.read_text():
        pytest.skip("huge pages are not given on request here")
    pool = Pool()
    for expected in (False, True, True):
        piece = pool.empty(4 * PAGE_BYTES).fill_(1)
        assert (huge_bytes(piece) >= 2 * PAGE_BYTES) == expected
        del piece


def huge_bytes(piece: torch.Tensor) -> int:
    """How much of a piece is in huge pages."""
    regions = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    for region in filter(None, regions):
        start, end = (int(part, 16) for part in region.split(" ", 1)[0].split("-"))
        if start <= piece.data_ptr() < end:
            return int(re.search(r"AnonHugePages: *(\d+)", region)[1]) * 1024
    raise AssertionError("the piece is nowhere")


def test_what_is_kept_for_others_has_a_bound(monkeypatch):
    pool = Pool()
    held = [pool.empty(PAGE_BYTES * (1 + n)) for n in range(8)]
    monkeypatch.setattr(huge_pages, "MOST_IDLE", 10 * PAGE_BYTES)
    places = {piece.data_ptr() for piece in held}
    assert len(places) == len(pool) == 8
    del held
    last = pool.empty(100 * PAGE_BYTES)
    assert len(last) == 100 * PAGE_BYTES and pool.idle_bytes <= 10 * PAGE_BYTES and len(pool) >= 3
