"""Room for logits is used again once nobody holds them, and never before."""

from __future__ import annotations

import threading

import pytest
import torch

from amphista.native import step
from amphista.native.step import Room


def test_what_is_free_is_taken_again():
    room = Room()
    first = room.empty(4, 10).data_ptr()
    assert [room.empty(*shape).data_ptr() for shape in [(4, 10), (2, 3), (40,)]] == [first] * 3


@pytest.mark.parametrize(
    "part", [lambda t: t, lambda t: t[2], lambda t: t[:, :3].T, lambda t: t.detach(), lambda t: t.numpy()]
)
def test_what_is_held_is_not_written_over(part):
    room = Room()
    held = part(room.empty(4, 10).fill_(7))
    for _ in range(3):
        room.empty(4, 10).fill_(0)
    assert (held == 7).all()


def test_a_larger_result_has_room():
    room = Room()
    small, large = room.empty(2, 3).fill_(1), room.empty(50, 20).fill_(2)
    assert large.shape == (50, 20) and (small == 1).all() and (large == 2).all()


def test_threads_have_rooms_of_their_own():
    room, found = Room(), []
    mine = room.empty(3).data_ptr()
    thread = threading.Thread(target=lambda: found.append(room.empty(3).data_ptr()))
    thread.start()
    thread.join()
    assert room.empty(3).data_ptr() == mine != found[0]


def test_very_large_results_are_not_kept(monkeypatch):
    monkeypatch.setattr(step, "MOST_KEPT", 8)
    room = Room()
    assert room.empty(3, 3).shape == (3, 3) and not vars(room._local)
    assert isinstance(room.empty(2, 4), torch.Tensor) and vars(room._local)
