from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from amphista.errors import ConfigError, DataError, TargetError
from amphista.target.target import Target
from amphista.train import hidden_store
from amphista.train.dataset import HiddenStates
from amphista.train.hidden_store import HiddenStore
from amphista.train.token_row import TokenRow

ROWS = [TokenRow(name, name, [1, 2, 3 + number], [0, 1, 1]) for number, name in enumerate("abc")]


def free_bytes(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))


def test_the_size_is_told_before_anything_is_written(target, tmp_path, monkeypatch):
    free_bytes(monkeypatch, 5_000_000_000)
    rows = [TokenRow(str(n), str(n), [1] * 1000, [0, *[1] * 999]) for n in range(200)]
    store = HiddenStore(tmp_path / "store", rows, target.identity)
    about = store.about
    num_bytes = 2 * 200 * 1000 * target.spec.hidden_size
    assert f"of 200 rows take {num_bytes / 1e9:.2f} GB" in about and "5.00 GB free" in about
    assert (store.folder / "hidden.f16").stat().st_size == num_bytes
    assert (store.folder / "hidden.f16").stat().st_blocks < 100, "a hole, but for its last page"


def test_a_disk_without_room_is_refused_and_left_alone(target, tmp_path, monkeypatch):
    free_bytes(monkeypatch, hidden_store.SPARE_BYTES + 500)
    with pytest.raises(ConfigError, match=re.escape("or train with data.store=false")):
        HiddenStore(tmp_path / "store", ROWS, target.identity)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]
    free_bytes(monkeypatch, hidden_store.SPARE_BYTES + 2 * 9 * target.spec.hidden_size)
    HiddenStore(tmp_path / "store", ROWS, target.identity)


def test_what_is_written_needs_no_room_again(target, tmp_path, monkeypatch):
    HiddenStates(target, ROWS, tmp_path).get(ROWS)
    free_bytes(monkeypatch, hidden_store.SPARE_BYTES)
    assert HiddenStore(tmp_path, ROWS, target.identity).has(ROWS[2])


def test_two_processes_see_each_others_rows(target, tmp_path):
    """The same files, opened twice: what one has put the other has, and opening again clears nothing."""
    one, other = (HiddenStore(tmp_path, ROWS, target.identity) for _ in range(2))
    states = torch.randn(3, target.spec.hidden_size).half().float()
    one.put(ROWS[1], states)
    assert other.has(ROWS[1]) and not other.has(ROWS[0])
    assert torch.equal(other.get(ROWS[1]), states)


def test_another_run_with_other_rows_leaves_an_open_store_alone(target, tmp_path):
    """Runs side by side share the folder of stores: each has its own, of whatever size, and equal ones share."""
    first = HiddenStore(tmp_path, ROWS, target.identity)
    states = torch.randn(3, target.spec.hidden_size).half().float()
    first.put(ROWS[0], states)
    for others in (ROWS[:1], [*ROWS, TokenRow("d", "d", [1] * 500, [0] * 500)], ROWS[::-1]):
        second = HiddenStore(tmp_path, others, target.identity)
        second.put(others[-1], torch.full((len(others[-1].token_ids), target.spec.hidden_size), 3.0))
        assert second.has(ROWS[0]) == (others[-1] is ROWS[0] or len(others) == 3)
        if others != ROWS[::-1]:
            assert first.has(ROWS[0]) and torch.equal(first.get(ROWS[0]), states)
    assert torch.equal(first.get(ROWS[0]), torch.full((3, target.spec.hidden_size), 3.0)), "equal rows share one store"


def test_taps_have_a_store_of_their_own(target, tmp_path):
    """Beside that of the hidden states alone, which an earlier run may have filled; in the order they are read in."""
    plain, tapped = (
        HiddenStates(target, ROWS, tmp_path),
        HiddenStates(target, ROWS, tmp_path, SimpleNamespace(taps=(1, 2), probes=None, num_early=0)),
    )
    assert plain.store.folder != tapped.store.folder
    alone, rows = plain.get(ROWS), tapped.get(ROWS)
    size = target.spec.hidden_size
    assert tapped.store.has(ROWS[0]) and {row.shape[1] for row in rows} == {3 * size}
    assert all(torch.equal(row[:, :size], states) for row, states in zip(rows, alone, strict=True))
    expected = target.hidden_states(torch.tensor([ROWS[1].token_ids]), (1, 2))[0]
    torch.testing.assert_close(rows[1], expected, atol=0, rtol=1e-3)


def test_early_residuals_stand_behind_states_that_all_drafters_store(target, tmp_path):
    """They are those of the stock model, as `output_hidden_states` shows them, and never stored."""
    plain = HiddenStates(target, ROWS, tmp_path)
    early = HiddenStates(target, ROWS, tmp_path, SimpleNamespace(taps=(), probes=None, num_early=1))
    assert plain.store.folder == early.store.folder
    for row, alone, found in zip(ROWS, plain.get(ROWS), early.get(ROWS), strict=True):
        _, first, *_ = target.model(torch.tensor([row.token_ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(found, torch.cat([alone, first[0]], dim=1), atol=1e-5, rtol=1e-5)
    with pytest.raises(TargetError, match="stock path, which lends no early layers"):
        Target(target.model).early_states(torch.tensor([[1]]), 1)


@pytest.mark.parametrize("lost", ["hidden.f16", "done.u1"])
def test_a_store_that_lacks_a_file_is_made_anew_beside_the_one_that_is_open(target, tmp_path, lost):
    first = HiddenStore(tmp_path, ROWS, target.identity)
    states = torch.ones(3, target.spec.hidden_size)
    first.put(ROWS[0], states)
    (first.folder / lost).unlink()
    second = HiddenStore(tmp_path, ROWS, target.identity)
    assert not second.has(ROWS[0]) and first.has(ROWS[0]) and torch.equal(first.get(ROWS[0]), states)
    second.put(ROWS[0], 2 * states)
    assert torch.equal(first.get(ROWS[0]), states)


def test_a_kill_while_a_store_is_made_leaves_nothing_that_is_believed(target, tmp_path, monkeypatch):
    def dying(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(hidden_store, "replace_folder", dying)
        with pytest.raises(KeyboardInterrupt):
            HiddenStore(tmp_path, ROWS, target.identity)
    assert not list(tmp_path.glob("[!.]*"))
    store = HiddenStore(tmp_path, ROWS, target.identity)
    assert not any(store.has(row) for row in ROWS) and len(list(tmp_path.iterdir())) == 2


def test_states_of_another_type_are_not_taken_for_these(target, tmp_path):
    """The fingerprint is the same by design; the states are not."""
    HiddenStates(target, ROWS, tmp_path).get(ROWS)
    for other in ("int8", "bfloat16"):
        assert not HiddenStore(tmp_path, ROWS, {**target.identity, "type": other}).has(ROWS[0])


def test_stores_beside_it_are_told_where_the_disk_is_full(target, tmp_path, monkeypatch):
    HiddenStates(target, ROWS, tmp_path).get(ROWS)
    free_bytes(monkeypatch, 0)
    with pytest.raises(ConfigError, match=r"make room \(0.00 GB are in stores of other rows"):
        HiddenStore(tmp_path, ROWS[:2], target.identity)


def test_other_rows_are_not_taken_for_these(target, tmp_path):
    HiddenStates(target, ROWS, tmp_path).get(ROWS)
    others = [TokenRow(row.id, row.group, row.token_ids[::-1], row.answers) for row in ROWS]
    assert not HiddenStore(tmp_path, others, target.identity).has(others[0])


def test_states_beyond_float16_name_their_row(target, tmp_path):
    store = HiddenStore(tmp_path, ROWS, target.identity)
    with pytest.raises(DataError, match=r"row 'b' has hidden states up to 7e\+04, more than float16 holds"):
        store.put(ROWS[1], torch.full((3, target.spec.hidden_size), 7e4))
    assert not store.has(ROWS[1])


def test_equal_ids_are_refused(target, tmp_path):
    with pytest.raises(DataError, match="two rows carry the same id"):
        HiddenStore(tmp_path, [ROWS[0], ROWS[0]], target.identity)
