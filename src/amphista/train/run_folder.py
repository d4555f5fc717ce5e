"""RunFolder: what a training run keeps on disk; folders are replaced as a whole, so a kill leaves a whole one.

    OUT/log.jsonl      one record per `log_every` steps, one per validation
    OUT/tensorboard/   the same for TensorBoard, where asked for
    OUT/state/         what resuming needs: weights, optimiser, schedule, progress
    OUT/best/          the drafter with the highest validated tau at 16 nodes
    OUT/last/          the drafter at the end
    OUT/.lock          held while a process trains

All processes of a run call every method; the main one writes what there is one of, while the others wait.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from amphista.drafter.checkpoint import check_out, recover_drafter
from amphista.errors import DataError, first_line
from amphista.files import (
    Lock,
    check_same_run,
    new_folder,
    read_json,
    recover_folder,
    replace_folder,
    write_file,
    write_json,
)

DRAFTERS_KEPT = ("best", "last")


@dataclass
class Progress:
    """Where a run stands; stored in OUT/state/progress.json."""

    step: int = 0
    positions: int = 0
    seconds: float = 0.0
    best_tau: float = 0.0


class RunFolder:
    """One run's folder; `identity` is what a resumed run must share with the one it goes on from."""

    def __init__(self, path: Path, accelerator: Accelerator, identity: dict[str, Any], *, tensorboard: bool) -> None:
        self.path, self._accelerator, self._identity = path, accelerator, identity
        self._tensorboard = tensorboard

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder; raises ConfigError where one is at work in it."""
        if not self._accelerator.is_main_process:
            yield
            return
        busy = f"another process is training into {self.path}: wait for its end or give another --out"
        with Lock(self.path / ".lock", busy):
            yield

    def resume(self) -> Progress:
        """Load what a killed run left, into everything that was prepared; or begin. raises ConfigError if not ours."""
        state = self.path / "state"
        if self._accelerator.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            recover_folder(self.path / "state")
            for name in DRAFTERS_KEPT:
                recover_drafter(self.path / name)
            for left_over in self.path.glob(".*.partial"):
                left_over.unlink()
            for name in DRAFTERS_KEPT:
                check_out(self.path / name)
        self._accelerator.wait_for_everyone()
        progress = Progress()
        if state.is_dir():
            check_same_run(f"{self.path} holds another training run", read_json(state / "config.json"), self._identity)
            try:
                self._accelerator.load_state(str(state))
                progress = Progress(**read_json(state / "progress.json"))
            except Exception as error:  # every part of it has a reader of its own
                raise DataError(
                    f"{state} is damaged and cannot be resumed ({first_line(error)}): remove it to begin anew; "
                    f"{self.path / 'best'} holds what was best so far"
                ) from error
        if self._accelerator.is_main_process:
            self._cut_log(progress.step)
            if self._tensorboard:
                events = {"purge_step": progress.step + 1}  # those behind come again
                self._accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": events})
        self._accelerator.wait_for_everyone()
        return progress

    def save_state(self, progress: Progress) -> None:
        """Replace OUT/state whole."""
        fresh = self.path / ".new-state"
        if self._accelerator.is_main_process:
            new_folder(self.path / "state")
        self._accelerator.wait_for_everyone()
        try:
            self._accelerator.save_state(str(fresh))  # every process adds its own part
        except RuntimeError as error:  # torch's, of a disk that is full
            raise DataError(
                f"the state cannot be written to {fresh}: {first_line(error)}. The last one stays"
            ) from error
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            write_json(fresh / "config.json", self._identity)
            write_json(fresh / "progress.json", asdict(progress))
            replace_folder(fresh, self.path / "state")
        self._accelerator.wait_for_everyone()

    def log(self, record: dict[str, Any]) -> None:
        """Append a record, which has a `step`."""
        if not self._accelerator.is_main_process:
            return
        with self._log_file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        if self._tensorboard:
            self._accelerator.log({name: value for name, value in scalars(record) if name != "step"}, record["step"])

    @property
    def _log_file(self) -> Path:
        return self.path / "log.jsonl"

    def _cut_log(self, step: int) -> None:
        """Drop records behind `step`: they will be written again."""
        known = step and self._log_file.is_file()
        lines = self._log_file.read_text(encoding="utf-8", errors="replace").splitlines() if known else []
        write_file(self._log_file, "".join(line + "\n" for line in lines if _step_of(line) <= step))


def scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of every number in nested records, names joined by '/', lists numbered from 1."""
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, dict | list | tuple):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value, start=1):
            yield from scalars(below, f"{name}/{key}" if name else str(key))


def _step_of(line: str) -> float:
    """The step of a log record; a line cut short by a kill belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
