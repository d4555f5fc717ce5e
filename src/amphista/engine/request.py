"""Request: a sequence on its way, its states, and what scheduler and loop ask of a sequence.

WAITING -> PREFILL -> RUNNING -> FINISHED | CANCELLED | FAILED      (cancelled or failed: from anywhere)
   ^---------- PREEMPTED <---'
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import StrEnum
from queue import SimpleQueue
from typing import Any, Protocol

from amphista.engine.prefixes import CachedRows, Match


class State(StrEnum):
    """Where a request is; a preempted one waits again."""

    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def has_ended(self) -> bool:
        """Whether it is one of the three that nothing follows."""
        return self in (State.FINISHED, State.CANCELLED, State.FAILED)


class Schedulable(Protocol):
    """What the scheduler reads of a sequence, and what the loop does to it; the engine knows the rest."""

    chunk_len: int  # tokens of its prompt that the next step may read

    @property
    def token_ids(self) -> list[int]:
        """Prompt and answer so far."""

    @property
    def num_unread(self) -> int:
        """Tokens to read before it decodes: its prompt, after a preemption its answer so far, too."""

    @property
    def num_left(self) -> int:
        """Tokens that may still be added: what its limit and the context leave."""

    @property
    def is_finished(self) -> bool:
        """Whether its answer has ended."""

    @property
    def rows(self) -> CachedRows:
        """Its caches, the same object until `release`; those of a finished one may pass into the prefix store."""

    def adopt(self, match: Match) -> None:
        """Begin with the matched rows, copied or moved, in place of its own, which are none."""

    def release(self) -> None:
        """Let go of its rows and have none; the prefix store or another sequence may hold them still."""


@dataclass(eq=False)
class Request:
    """A sequence on its way. `outbox` is its reader's; everything else is written by the scheduler alone.

    key: whose turn it is, among others' (a tenant). namespace: within which rows are reused; None: not at all.
    """

    sequence: Schedulable
    key: Hashable = ""
    namespace: Hashable = ""
    submitted_at: float = 0.0
    state: State = State.WAITING
    number: int = -1  # by order of arrival
    admitted_at: float | None = None  # the first time
    num_reserved: int = 0  # rows
    outbox: SimpleQueue[Any] = field(default_factory=SimpleQueue)
