"""Progress of long commands: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StepProgress:
    """Reports lines and steps; use as a context manager. One of several processes is shown, the others say nothing."""

    def __init__(self, *, is_shown: bool = True) -> None:
        console = Console(stderr=True, quiet=not is_shown)
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
        )
        self._is_shown, self._is_terminal = is_shown, console.is_terminal
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> StepProgress:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._bar.stop()

    def line(self, text: str) -> None:
        """Something worth keeping on the screen."""
        if self._is_terminal:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._is_shown:
            print(text, file=sys.stderr, flush=True)

    def step(self, done: int, total: int, text: str) -> None:
        """Where the run stands."""
        if self._is_terminal:
            self._bar.update(self._task, completed=done, total=total, description=text)
        elif self._is_shown:
            print(f"step {done}/{total}  {text}", file=sys.stderr, flush=True)
