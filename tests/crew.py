"""How many threads calls of the C step get (native/team.h), as tests see it."""

from __future__ import annotations

import ctypes

from amphista.native.build import load


class Crew(ctypes.Structure):
    _fields_ = [
        ("waiting", ctypes.c_float),
        ("most", ctypes.c_int),
        ("calls", ctypes.c_int),
        ("patience", ctypes.c_int),
    ]

    def note(self, team, threads, share):
        """A call of `team` threads of those asked for, which waited for a share of its time."""
        load().amphista_note_crew(ctypes.byref(self), team, threads, ctypes.c_float(share))

    def team(self, threads):
        return min(threads, self.most or threads)


def the_crew():
    """The library's own."""
    return Crew.in_dll(load(), "amphista_crew")


def set_crew(most=0, patience=0):
    """Of any number of threads, or at most so many."""
    crew = the_crew()
    crew.waiting, crew.most, crew.calls, crew.patience = 0, most, 0, patience
