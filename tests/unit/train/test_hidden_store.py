from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from amphista.errors import ConfigError, DataError
from amphista.train import hidden_store
from amphista.train.dataset import HiddenStates
from amphista.train.hidden_store import HiddenStore
from amphista.train.rows import TokenRow

ROWS = [TokenRow(name, name, [1, 2, 3 + number], [0, 1, 1]) for number, name in enumerate("abc")]


def free_bytes(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))


def test_the_size_is_told_before_anything_is_written(target, tmp_path, monkeypatch):
    free_bytes(monkeypatch, 5_000_000_000)
    rows = [TokenRow(str(n), str(n), [1] * 1000, [0, *[1] * 999]) for n in range(200)]
    about = HiddenStore(tmp_path / "store", rows, target.fingerprint).about
    num_bytes = 2 * 200 * 1000 * target.spec.hidden_size
    assert f"of 200 rows take {num_bytes / 1e9:.2f} GB" in about and "5.00 GB free" in about
    assert (tmp_path / "store" / "hidden.f16").stat().st_size == num_bytes
    assert (tmp_path / "store" / "hidden.f16").stat().st_blocks < 100, "a hole, but for its last page"


def test_a_disk_without_room_is_refused_and_left_alone(target, tmp_path, monkeypatch):
    free_bytes(monkeypatch, hidden_store.SPARE_BYTES + 500)
    with pytest.raises(ConfigError, match=re.escape("or train with data.store=false")):
        HiddenStore(tmp_path / "store", ROWS, target.fingerprint)
    assert list((tmp_path / "store").iterdir()) == []
    free_bytes(monkeypatch, hidden_store.SPARE_BYTES + 2 * 9 * target.spec.hidden_size)
    HiddenStore(tmp_path / "store", ROWS, target.fingerprint)


def test_what_is_written_needs_no_room_again(target, tmp_path, monkeypatch):
    HiddenStates(target, ROWS, tmp_path).get(ROWS)
    free_bytes(monkeypatch, hidden_store.SPARE_BYTES)
    assert HiddenStore(tmp_path, ROWS, target.fingerprint).has(ROWS[2])


def test_two_processes_see_each_others_rows(target, tmp_path):
    """The same files, opened twice: what one has put the other has, and opening again clears nothing."""
    one, other = (HiddenStore(tmp_path, ROWS, target.fingerprint) for _ in range(2))
    states = torch.randn(3, target.spec.hidden_size).half().float()
    one.put(ROWS[1], states)
    assert other.has(ROWS[1]) and not other.has(ROWS[0])
    assert torch.equal(other.get(ROWS[1]), states)


def test_other_rows_are_not_taken_for_these(target, tmp_path):
    HiddenStates(target, ROWS, tmp_path).get(ROWS)
    others = [TokenRow(row.id, row.group, row.token_ids[::-1], row.answers) for row in ROWS]
    assert not HiddenStore(tmp_path, others, target.fingerprint).has(others[0])


def test_states_beyond_float16_name_their_row(target, tmp_path):
    store = HiddenStore(tmp_path, ROWS, target.fingerprint)
    with pytest.raises(DataError, match=r"row 'b' has hidden states up to 7e\+04, more than float16 holds"):
        store.put(ROWS[1], torch.full((3, target.spec.hidden_size), 7e4))
    assert not store.has(ROWS[1])


def test_equal_ids_are_refused(target, tmp_path):
    with pytest.raises(DataError, match="two rows carry the same id"):
        HiddenStore(tmp_path, [ROWS[0], ROWS[0]], target.fingerprint)
