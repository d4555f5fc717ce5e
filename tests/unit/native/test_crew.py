"""Threads that wait for each other most of the time, because other programs have their cores, become fewer, and more
again when that is over."""

from __future__ import annotations

import math

import pytest
import torch

from amphista.native.crew import FIRST_PATIENCE, MOST_PATIENCE, Crew

CALL = 0.004  # seconds


@pytest.fixture(params=[2, 8])
def threads(request, monkeypatch):
    """How many torch has."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


def work(crew, seconds, waiting, call=CALL):
    """Calls for so long, each thread of which waits for waiting(team) of the time; how many threads each had."""
    teams = []
    for _ in range(math.ceil(seconds / call)):
        teams.append(crew.num_threads())
        crew.note(teams[-1], waiting(teams[-1]) * call, call)
    return teams


def all_cores_busy(team):
    return 0.8 if team > 1 else 0.0


def one_core_busy(team, cores=8):
    return 0.8 if team == cores else 0.01


def quiet(team):
    return 0.05 if team > 1 else 0.0


@pytest.mark.parametrize("call", [0.0005, CALL, 0.3, 5.0])
@pytest.mark.parametrize("waiting", [0.0, 0.05, 0.3 / 2])
def test_a_crew_that_works_stays_whole(threads, call, waiting):
    assert set(work(Crew(), 100, lambda team: waiting, call)) == {threads}


@pytest.mark.parametrize("call", [0.0005, CALL, 0.3])
def test_one_late_thread_is_no_reason(threads, call):
    """Another program's turn of 10 ms, now and then: in a call of less all else waits, and the call takes so long."""
    crew = Crew()
    for _ in range(50):
        crew.note(threads, 0.010, max(call, 0.010))
        assert set(work(crew, 0.2, quiet, call)) == {threads}


def test_where_all_cores_are_busy_one_thread_is_left_and_seldom_more(threads):
    crew = Crew()
    assert work(crew, 0.1, all_cores_busy)[-1] == 1
    teams = work(crew, 120, all_cores_busy)
    assert sum(team > 1 for team in teams) * CALL < 1.0
    assert len(set(teams)) > 1, "it is tried again"


def test_one_of_two_that_waits_for_the_other_most_of_the_time_is_one_too_many(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    crew = Crew()
    assert work(crew, 0.1, lambda team: 0.6 / 2 if team == 2 else 0)[-1] == 1


def test_short_calls_that_wait_do_not_outweigh_long_ones_that_work(threads):
    crew = Crew()
    for _ in range(2000):
        crew.note(crew.num_threads(), 0.0008, 0.001)
        crew.note(crew.num_threads(), 0.002, 0.04)
        assert crew.num_threads() == threads


def test_it_is_whole_again_soon_after_that_is_over(threads):
    crew = Crew()
    work(crew, 60, all_cores_busy)
    teams = work(crew, 4 * MOST_PATIENCE, quiet)
    assert teams == sorted(teams) and teams[-1] == threads
    assert set(work(crew, 10, quiet)) == {threads}


def test_all_cores_but_one_are_used(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    crew = Crew()
    work(crew, 30, one_core_busy)
    teams = work(crew, 60, one_core_busy)
    assert sum(team == 7 for team in teams) > 0.95 * len(teams)


def test_what_has_long_gone_well_is_forgotten(threads):
    """Busy for a while, quiet, busy again: the second time is like the first."""
    crew = Crew()
    work(crew, 60, all_cores_busy)
    work(crew, 60, quiet)
    assert work(crew, 0.1, all_cores_busy)[-1] == 1
    teams = work(crew, 2 * FIRST_PATIENCE, all_cores_busy)
    assert max(teams) > 1


def test_fewer_threads_asked_for(monkeypatch):
    """`torch.set_num_threads` holds at once, whatever the crew was."""
    crew = Crew()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    work(crew, 0.1, lambda team: 0.3 if team > 4 else 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert set(work(crew, 30, quiet)) == {1}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert crew.num_threads() == 2


def test_whole_while_something_is_measured(threads):
    crew = Crew()
    work(crew, 0.1, all_cores_busy)
    with crew.whole():
        assert set(work(crew, 1, all_cores_busy)) == {threads}
    assert crew.num_threads() == 1
