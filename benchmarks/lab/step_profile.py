"""How much of a decode step is Python: its time between tensor operations.

    outside = (step - sum of its operations) - calls x what timing a call costs

An answer is decoded with a timer around every call into torch (a `TorchFunctionMode`), several times over; of each step
the shortest time between operations counts. The timer's own cost lies there, too: it is measured beside it, on calls
that do nearly nothing, and taken off. `at_most_ms` is what it was before that. The profiler of torch would not do: it
also times what operations call inside, several times as many events.

An operation is a call from Python, its argument parsing and dispatch included. Waiting for the device and replaying a
captured graph count as operations. What remains is the interpreter: this package's own code between the calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from amphista.engine.params import SamplingParams
from amphista.llm import LLM

QUESTION = "Explain in detail how a steam engine works, and what it was used for."
NEW_TOKENS = 64
ROUNDS = 4
CALIBRATIONS, CALIBRATED_CALLS = 200, 500


class OperationTimer(TorchFunctionMode):
    """Seconds and number of calls into torch made inside the `with` block, by this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.calls = 0.0, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.time(func, *args, **(kwargs or {}))

    def time(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call it; what it takes counts as an operation."""
        started = time.perf_counter()
        try:
            return func(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - started
            self.calls += 1

    @contextmanager
    def watching(self, *calls: tuple[Any, str]) -> Iterator[OperationTimer]:
        """The block, with calls that are no torch functions timed as well: (owner, name)."""
        with ExitStack() as stack:
            for owner, name in calls:
                stack.enter_context(patch.object(owner, name, self._timed(getattr(owner, name))))
            stack.enter_context(self)
            yield self

    def _timed(self, func: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            return self.time(func, *args, **kwargs)

        return timed


@dataclass(frozen=True)
class Timed:
    """A decode step, or the target's forward inside it, under the timer."""

    seconds: float
    operations: float
    calls: int

    def between(self, per_call: float = 0.0) -> float:
        """Seconds outside operations, with so many taken off for each call."""
        return self.seconds - self.operations - per_call * self.calls


def profile_steps(llm: LLM, name: str, *, rounds: int = ROUNDS, new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """Milliseconds of a mean decode step outside tensor operations, and how many operations it has."""
    passes = [_pass(llm, new_tokens) for _ in range(rounds + 1)][1:]  # the first is not counted
    per_call = timer_seconds()
    steps = [min(same, key=lambda pair: pair[0].between()) for same in zip(*passes, strict=False)]  # the same steps
    return {"drafter": name, "timer_us": 1e6 * per_call, **between_operations(steps, per_call)}


def between_operations(steps: Sequence[tuple[Timed, Timed]], per_call: float) -> dict[str, Any]:
    """Means over (step, the forward in it); without any there is nothing to tell."""
    count = max(1, len(steps))
    return {
        "num_steps": len(steps),
        "calls": sum(step.calls for step, _ in steps) / count,
        "operations_ms": 1000 * sum(step.operations for step, _ in steps) / count,
        "outside_ms": 1000 * sum(max(0.0, step.between(per_call)) for step, _ in steps) / count,
        "forward_ms": 1000 * sum(max(0.0, forward.between(per_call)) for _, forward in steps) / count,
        "at_most_ms": 1000 * sum(step.between() for step, _ in steps) / count,
    }


def timer_seconds() -> float:
    """What timing one call adds outside of it: the shortest of a few hundred at a time."""
    tensor, best = torch.zeros(1), float("inf")
    for _ in range(CALIBRATIONS):
        timer = OperationTimer()
        started = time.perf_counter()
        with timer:
            for _ in range(CALIBRATED_CALLS):
                tensor.view(1)
        best = min(best, (time.perf_counter() - started - timer.seconds) / CALIBRATED_CALLS)
    return best


def _pass(llm: LLM, new_tokens: int) -> list[tuple[Timed, Timed]]:
    """Every decode step of one answer, with the forward in it."""
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    steps = llm.stream_ids(_prompt(llm), params).steps()
    next(steps)  # the prefill
    found: list[tuple[Timed, Timed]] = []
    while True:
        forwards: list[Timed] = []
        timer = OperationTimer()
        with timer.watching(*_device_calls(llm)), _noting_forwards(llm, timer, forwards):
            step, result = _noted(timer, lambda: next(steps, None))
        if result is None:
            return found
        found.append((step, forwards[0]))


def _noted(timer: OperationTimer, work: Callable[[], Any]) -> tuple[Timed, Any]:
    """What one call took under the timer, and its result."""
    operations, calls, started = timer.seconds, timer.calls, time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    return Timed(seconds, timer.seconds - operations, timer.calls - calls), result


@contextmanager
def _noting_forwards(llm: LLM, timer: OperationTimer, forwards: list[Timed]) -> Iterator[None]:
    forward = llm.target.forward

    def noted(*args: Any) -> Any:
        timed, output = _noted(timer, lambda: forward(*args))
        forwards.append(timed)
        return output

    with patch.object(llm.target, "forward", noted):
        yield


def _prompt(llm: LLM) -> list[int]:
    if llm.target.text is not None:
        return llm.prompt_ids(QUESTION)
    return torch.arange(64).remainder(llm.target.spec.vocab_size).tolist()


def _device_calls(llm: LLM) -> list[tuple[Any, str]]:
    """Where Python waits for the device or hands it a whole graph, outside any torch function."""
    if llm.target.device.type != "cuda":
        return []
    return [(torch.cuda, "synchronize"), (torch.cuda.CUDAGraph, "replay")]
