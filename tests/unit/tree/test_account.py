from __future__ import annotations

import pytest

from amphista.tree.account import CREDIT, FORGIVEN, Account


def test_plain_steps_are_even_and_forgive_a_little():
    account = Account()
    for _ in range(100):
        account.book(1, 1.0)
    assert account.balance == pytest.approx(100 * FORGIVEN)


def test_a_request_that_loses_grows_wary_and_then_stops_its_batch():
    account, seen = Account(), []
    for _ in range(12):
        account.book(1, 2.0)
        seen.append((account.is_wary, account.is_spent))
    assert seen[0] == (False, False) and (True, False) in seen and seen[-1] == (True, True)


def test_what_was_gained_long_ago_may_not_all_be_lost_again():
    account = Account()
    for _ in range(500):
        account.book(10, 1.5)
    assert account.balance == CREDIT
