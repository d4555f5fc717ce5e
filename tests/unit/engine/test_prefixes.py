from __future__ import annotations

import pytest

from amphista.engine import prefixes
from amphista.engine.prefixes import BLOCK, PrefixStore
from tests.scheduled import Rows


def rows_of(token_ids, slack=0):
    rows = Rows(slack=slack)
    for token, following in zip(token_ids, [*token_ids[1:], 0], strict=True):
        rows.append(token, following)
    return rows


SYSTEM = list(range(100, 100 + 2 * BLOCK))


def test_the_turn_before_is_to_be_moved_and_one_row_less_than_shared():
    store = PrefixStore(10_000)
    rows = rows_of(SYSTEM + [1, 2, 3])
    assert store.keep("", rows)
    match = store.find("", SYSTEM + [1, 2, 3, 4, 5])
    assert match is not None and match.rows is rows
    assert (match.num_rows, match.is_copy) == (len(SYSTEM) + 3 - 1, False)
    assert store.num_bytes == rows.num_bytes  # still there: to forget it is the caller's
    store.forget(rows)
    assert store.num_bytes == 0 and store.find("", SYSTEM + [1, 2, 3, 4]) is None
    store.check_integrity()


def test_the_last_token_of_a_prompt_is_always_read():
    store = PrefixStore(10_000)
    store.keep("", rows_of(SYSTEM))
    for prompt in (SYSTEM, SYSTEM[: BLOCK + 5], SYSTEM[:BLOCK]):
        assert store.find("", prompt).num_rows == len(prompt) - 1
    assert store.find("", SYSTEM[: BLOCK - 1]) is None


@pytest.mark.parametrize(("num_lost", "is_copy"), [(0, False), (BLOCK - 1, False), (BLOCK, True), (100, True)])
def test_what_would_lose_a_block_is_copied(num_lost, is_copy):
    store = PrefixStore(10_000)
    store.keep("", rows_of(SYSTEM + [7] * num_lost))
    match = store.find("", SYSTEM + [8] * 200)
    assert (match.num_rows, match.is_copy) == (len(SYSTEM) - 1, is_copy)


def test_rows_in_use_are_copied_and_cost_nothing():
    store = PrefixStore(10_000)
    rows = rows_of(SYSTEM)
    store.share("", rows)
    assert store.num_bytes == 0
    match = store.find("", SYSTEM + [1])
    assert match.rows is rows and match.is_copy
    with pytest.raises(StopIteration):
        store.drop_oldest()  # nothing is kept, and what is shared is not the store's to drop
    store.forget(rows)
    assert store.find("", SYSTEM + [1]) is None
    store.check_integrity()


def test_the_longest_prefix_wins_and_then_the_kept_one():
    store = PrefixStore(100_000)
    short, long, shared = rows_of(SYSTEM), rows_of(SYSTEM + [5] * 40), rows_of(SYSTEM + [5] * 40)
    store.share("", shared)
    store.keep("", long)
    store.keep("", short)
    assert store.find("", SYSTEM + [5] * 60).rows is long
    assert store.find("", SYSTEM + [6] * 60).rows is short


def test_a_few_tokens_more_within_a_block_win_too():
    store = PrefixStore(100_000)
    longer = rows_of(SYSTEM + [5] * 3 + [1] * 50)
    store.keep("", longer)
    store.keep("", rows_of(SYSTEM))
    assert store.find("", SYSTEM + [5] * 3 + [9] * 60).rows is longer


def test_only_committed_rows_count():
    store = PrefixStore(10_000)
    rows = rows_of(SYSTEM)
    rows.token_ids += [1, 2, 3]  # the pending token has no row yet
    store.share("", rows)
    assert store.find("", SYSTEM + [1, 2, 3, 4]).num_rows == len(SYSTEM) - 1


def test_namespaces_do_not_meet():
    store = PrefixStore(10_000)
    store.keep("a", rows_of(SYSTEM))
    assert store.find("b", SYSTEM) is None and store.find("a", SYSTEM) is not None


def test_bytes_stay_within_the_budget_and_the_least_recently_used_goes():
    store = PrefixStore(3 * 10 * len(SYSTEM) + 50)
    kept = [rows_of([n, *SYSTEM[1:]]) for n in range(3)]
    for rows in kept:
        assert store.keep("", rows)
    assert store.find("", kept[0].token_ids) is not None  # used: 1 is the oldest now
    assert store.keep("", rows_of([3, *SYSTEM[1:]]))
    store.check_integrity()
    assert [store.find("", rows.token_ids) is not None for rows in kept] == [True, False, True]


def test_what_is_too_large_or_too_short_is_not_kept_and_costs_nobody_his_place():
    store = PrefixStore(10 * len(SYSTEM))
    rows = rows_of(SYSTEM)
    assert store.keep("", rows)
    assert not store.keep("", rows_of([9, *SYSTEM], slack=5))
    assert not store.keep("", rows_of(SYSTEM[: BLOCK - 1]))
    assert store.find("", SYSTEM).rows is rows


def test_colliding_hashes_cost_a_miss_and_never_a_row(monkeypatch):
    monkeypatch.setattr(prefixes, "hash", lambda blocks: 1, raising=False)
    store = PrefixStore(100_000)
    mine, other = rows_of(SYSTEM), rows_of([9] * 200)
    store.keep("", other)
    assert store.find("", SYSTEM) is None
    store.keep("", mine)
    assert store.find("", SYSTEM).rows is mine
    store.forget(mine)
    store.forget(other)
    store.check_integrity()
