"""Threads that wait for each other most of the time, because other programs have their cores, become fewer, and more
again when that is over."""

from __future__ import annotations

import pytest
import torch

from tests.crew import Crew, set_crew, the_crew

LEAST_PATIENCE, MOST_PATIENCE = 64, 4096


def worked(crew, threads, num_calls, share):
    """So many calls, which wait for share(team) of their time; how many threads each had."""
    teams = []
    for _ in range(num_calls):
        teams.append(crew.team(threads))
        crew.note(teams[-1], threads, share(teams[-1]))
    return teams


def busy(team):
    """Other programs have all cores: two threads hardly ever run together."""
    return 0.95 if team > 1 else 0.0


def test_a_crew_that_works_stays_whole():
    crew = Crew()
    assert set(worked(crew, 8, 5000, lambda team: 0.3)) == {8}


def test_one_late_thread_is_no_reason():
    crew = Crew()
    for _ in range(200):
        worked(crew, 2, 1, lambda team: 1.0), worked(crew, 2, 5, lambda team: 0.02)
    assert crew.team(2) == 2


@pytest.mark.parametrize(("threads", "share", "left"), [(2, 0.95, 1), (8, 0.95, 3), (8, 0.6, 3), (3, 1.0, 1)])
def test_a_crew_that_waits_gets_smaller_within_a_few_calls(threads, share, left):
    crew = Crew()
    worked(crew, threads, 8, lambda team: share if team == threads else 0.0)
    assert crew.team(threads) == left


def test_where_all_cores_are_busy_one_thread_is_left_and_seldom_more():
    crew = Crew()
    teams = worked(crew, 8, 30000, busy)
    assert sum(team > 1 for team in teams) < 40
    assert teams[-1] == 1 and crew.patience == MOST_PATIENCE


def test_it_is_whole_again_when_that_is_over():
    crew = Crew()
    worked(crew, 8, 300, busy)
    assert crew.team(8) == 1
    teams = worked(crew, 8, 3 * crew.patience + 1, lambda team: 0.05)
    assert teams[-1] == 8 and teams == sorted(teams)


def test_what_has_long_gone_well_is_forgotten():
    """Busy for a while, quiet, busy again: the second time is like the first."""
    crew = Crew()
    worked(crew, 2, 2000, busy)
    worked(crew, 2, 2 * MOST_PATIENCE, lambda team: 0.0)
    worked(crew, 2, 8, busy)
    assert crew.team(2) == 1 and crew.patience == LEAST_PATIENCE


@pytest.mark.parametrize("most", [1, 3, 0])
def test_a_call_has_the_threads_that_the_crew_allows(monkeypatch, most):
    """And gives the same, to the bit."""
    from tests.laws.test_native_drafting import drafted, in_c

    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    drafter = in_c("amphista-full")
    set_crew(most, patience=1)
    try:
        found = drafted(drafter, [9])
        assert the_crew().most == 2 * most
        set_crew()
        assert drafted(drafter, [9]) == found
    finally:
        set_crew()
