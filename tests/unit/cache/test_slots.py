"""cache/slots.py: slots are views of one storage, survive its growth, and count a row only when it is committed."""

from __future__ import annotations

import pytest
import torch

from amphista.cache.slots import ROOM_STEP, SPARE_STEPS, SlotCache
from amphista.errors import CapacityError
from tests.tiny import tiny_target


def rows(value, count, heads=2, size=4):
    return torch.full((1, heads, count, size), float(value))


@pytest.fixture
def cache():
    """Two layers, three slots, holding 2, 5 and 3 rows of the slot's own number plus 1."""
    made = SlotCache(2, 3)
    for number, slot in enumerate(made.slots):
        for layer in slot.layers:
            layer.append(rows(number + 1, [2, 5, 3][number]), -rows(number + 1, [2, 5, 3][number]))
        slot.commit(range([2, 5, 3][number]))
    return made


def held(cache, slot):
    layer = cache.layers[1]
    length = cache.slots[slot].num_committed
    return layer.keys[slot, 0, :length, 0].tolist(), layer.values[slot, 0, :length, 0].tolist()


def test_slots_are_rows_of_one_tensor(cache):
    assert cache.lengths(3) == [2, 5, 3]
    assert cache.layers[0].keys.shape == (3, 2, ROOM_STEP, 4)
    assert held(cache, 1) == ([2.0] * 5, [-2.0] * 5)
    assert cache.layers[0].keys[0, :, 2:].abs().sum() == 0, "rows not written are zeros, never what memory held"
    cache.check_integrity()


def test_growth_of_one_slot_keeps_the_others(cache):
    for layer in cache.slots[2].layers:
        layer.append(rows(9, ROOM_STEP), rows(9, ROOM_STEP))
    cache.slots[2].commit(range(ROOM_STEP))
    assert cache.layers[0].keys.shape[2] > ROOM_STEP
    assert held(cache, 0) == ([1.0] * 2, [-1.0] * 2) and held(cache, 1) == ([2.0] * 5, [-2.0] * 5)
    assert held(cache, 2)[0] == [3.0] * 3 + [9.0] * ROOM_STEP
    for slot in cache.slots:  # the views follow
        assert slot.layers[0].keys.data_ptr() != 0 and slot.layers[0].capacity == cache.layers[0].keys.shape[2]


def test_a_row_each(cache):
    cache.make_room(2)
    new = torch.stack([rows(7, 1)[0], rows(8, 1)[0]])
    for layer in cache.layers:
        layer.write(new, new, torch.arange(2), torch.tensor(cache.lengths(2)))
    assert cache.lengths(3) == [2, 5, 3], "not counted before it is committed"
    cache.advance(2)
    assert cache.lengths(3) == [3, 6, 3]
    assert held(cache, 0)[0] == [1.0, 1.0, 7.0] and held(cache, 1)[0] == [2.0] * 5 + [8.0]
    assert held(cache, 2)[0] == [3.0] * 3


def test_room_is_made_before_it_is_needed(cache):
    for layer in cache.slots[1].layers:
        layer.append(rows(4, ROOM_STEP - 5), rows(4, ROOM_STEP - 5))
    cache.slots[1].commit(range(ROOM_STEP - 5))
    assert cache.layers[0].keys.shape[2] == ROOM_STEP
    cache.make_room(1)
    assert cache.layers[0].keys.shape[2] == ROOM_STEP, "the full slot does not decode"
    cache.make_room(2)
    assert cache.layers[0].keys.shape[2] > ROOM_STEP and held(cache, 0)[0] == [1.0] * 2


def test_room_that_long_sequences_have_left_is_given_back(cache):
    length = SPARE_STEPS * ROOM_STEP
    for layer in cache.slots[2].layers:
        layer.append(rows(9, length), rows(9, length))
    cache.slots[2].commit(range(length))
    before = cache.capacity
    cache.make_room(2)
    assert cache.capacity == before, "a slot that does not decode now holds its rows"
    cache.slots[2].trim(3)
    cache.make_room(2)
    assert cache.capacity == ROOM_STEP < before and cache.layers[0].keys.shape[2] == ROOM_STEP
    assert held(cache, 1) == ([2.0] * 5, [-2.0] * 5) and held(cache, 2) == ([3.0] * 3, [-3.0] * 3)


def test_move(cache):
    cache.move(2, 0)
    assert cache.lengths(3) == [3, 5, 0] and held(cache, 0) == ([3.0] * 3, [-3.0] * 3)
    cache.check_integrity()
    cache.slots[0].layers[0].num_rows = 1
    with pytest.raises(CapacityError, match="layers disagree"):
        cache.check_integrity()


def test_a_forward_that_breaks_off_leaves_nothing_behind(monkeypatch):
    target = tiny_target(dtype=torch.float64)
    whole, broken = target.new_slots(2), target.new_slots(2)
    for slots in (whole, broken):
        target.prefill([5, 6, 7], slots.slots[0])
        target.prefill([8], slots.slots[1])

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target.model.model.layers[1], "forward", fails)
        with pytest.raises(KeyboardInterrupt):
            target.extend([30, 31], broken)
    assert broken.lengths(2) == [3, 1]
    broken.check_integrity()
    expected = target.extend([40, 41], whole).logits
    torch.testing.assert_close(target.extend([40, 41], broken).logits, expected, atol=0, rtol=0)


def test_the_end_of_the_context_is_an_error():
    target = tiny_target(max_position_embeddings=4)
    slots = target.new_slots(1)
    target.prefill([1, 2, 3, 4], slots.slots[0])
    with pytest.raises(CapacityError, match="position 4 is beyond the context of 4"):
        target.extend([5], slots)
