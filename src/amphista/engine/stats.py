"""The one place that counts tokens and time (ALGORITHM section 8).

tau = tokens committed per target decode forward = (num_tokens - 1) / num_steps: the prefill and the token it gives are
not counted. Tokens are counted when they are committed, never by tokenising text again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from amphista.tree.children import Growth

PHASES = ("prefill", "draft", "tree", "verify", "accept", "commit")


@dataclass
class DecodeStats:
    """Counters of one answer. Seconds are wall time, those of a step counted in full for every sequence that shares
    it; `phase_seconds` sums to a little less than `seconds`.

    Per decode step: `accepted` draft tokens, how many were `expected` by the drafter's own probabilities, `tree_nodes`
    verified, whether heads were asked (`drafted`), `step_seconds`. `num_dropped`: tokens the target
    chose behind the end of the answer; they are neither emitted nor counted.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0
    accepted: list[int] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    tree_nodes: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    num_dropped: int = 0
    prefill_seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def num_steps(self) -> int:
        """Target decode forwards."""
        return len(self.accepted)

    @property
    def tau(self) -> float | None:
        """Mean tokens committed per target decode forward; None without a step."""
        return (self.num_tokens - 1) / self.num_steps if self.num_steps else None

    @property
    def expected_tau(self) -> float | None:
        """What tau should have been by the drafter's own probabilities; None without a step."""
        return 1 + sum(self.expected) / self.num_steps if self.num_steps else None

    @property
    def decode_seconds(self) -> float:
        """All decode steps together."""
        return sum(self.step_seconds)

    @property
    def seconds(self) -> float:
        """Prefill plus decode, without loading and tokenising."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def tokens_per_second(self) -> float | None:
        return self.num_tokens / self.seconds if self.seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first per second of decoding; None without a step."""
        return (self.num_tokens - 1) / self.decode_seconds if self.num_steps and self.decode_seconds else None

    def count(self, growth: Growth, num_accepted: int, *, drafted: bool) -> None:
        """Add a decode step; its tokens are counted as they are taken."""
        self.accepted.append(num_accepted)
        self.expected.append(growth.expected)
        self.tree_nodes.append(growth.tree.num_nodes)
        self.drafted.append(drafted)

    def snapshot(self) -> tuple[Any, ...]:
        """What `restore` needs to forget all that is counted from now on."""
        return self.num_steps, self.num_tokens, self.num_dropped, self.prefill_seconds, dict(self.phase_seconds)

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Forget what was counted since."""
        num_steps, self.num_tokens, self.num_dropped, self.prefill_seconds, self.phase_seconds = snapshot
        for counted in (self.accepted, self.expected, self.tree_nodes, self.drafted, self.step_seconds):
            del counted[num_steps:]


class Clock:
    """Times phases of a step into the stats of all its sequences; waits for the device first where work is queued.

    whole: what all phases of this step are counted as.
    """

    def __init__(self, stats: Sequence[DecodeStats], device: torch.device, *, whole: str | None = None) -> None:
        self._stats, self._device, self._whole = stats, device, whole

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of a block to one phase."""
        started = self.now()
        yield
        seconds = self.now() - started
        for stats in self._stats:
            stats.phase_seconds[self._whole or name] += seconds

    def now(self) -> float:
        """Seconds, after all queued device work is done."""
        return now(self._device)


def now(device: torch.device) -> float:
    """Wall seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
