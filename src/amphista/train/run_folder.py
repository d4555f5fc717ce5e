"""RunFolder: what a training run keeps on disk; folders are replaced as a whole, so a kill leaves a whole one.

    OUT/log.jsonl      one record per `log_every` steps, one per validation
    OUT/tensorboard/   the same for TensorBoard, where asked for
    OUT/state/         what resuming needs: weights, optimiser, schedule, progress
    OUT/best/          the drafter with the highest validated tau at 16 nodes
    OUT/last/          the drafter at the end

All processes of a run call every method; the main one writes what there is one of, while the others wait.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from amphista.drafter.checkpoint import check_out, recover_drafter
from amphista.errors import ConfigError
from amphista.train.tensorboard import Writer, open_writer, write_record

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
        self.path, self._accelerator = path, accelerator
        self._identity = json.loads(json.dumps(identity))
        self._tensorboard = tensorboard
        self._writer: Writer | None = None

    def resume(self) -> Progress:
        """Load what a killed run left, into everything that was prepared; or begin. raises ConfigError if not ours."""
        self.path.mkdir(parents=True, exist_ok=True)
        progress = Progress()
        states = (self.path / name for name in ("state", "state.old"))  # old: killed between two renames
        state = next((place for place in states if (place / "progress.json").is_file()), None)
        if state is not None:
            if json.loads((state / "config.json").read_text()) != self._identity:
                raise ConfigError(
                    f"{self.path} holds a run with other settings, data or target: choose another --out or delete it"
                )
            self._accelerator.load_state(str(state))
            progress = Progress(**json.loads((state / "progress.json").read_text()))
        if self._accelerator.is_main_process:
            for name in DRAFTERS_KEPT:
                recover_drafter(self.path / name)
                check_out(self.path / name)
            self._cut_log(progress.step)
            if self._tensorboard:
                self._writer = open_writer(self.path / "tensorboard", progress.step)
        self._accelerator.wait_for_everyone()
        return progress

    def save_state(self, progress: Progress) -> None:
        """Replace OUT/state; at every moment it, or OUT/state.old, is whole."""
        fresh, state, old = (self.path / name for name in ("state.new", "state", "state.old"))
        if self._accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        self._accelerator.save_state(str(fresh))  # every process adds its own part
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            (fresh / "config.json").write_text(json.dumps(self._identity))
            (fresh / "progress.json").write_text(json.dumps(asdict(progress)))
            if state.exists():
                shutil.rmtree(old, ignore_errors=True)
                state.rename(old)
            fresh.rename(state)
            shutil.rmtree(old, ignore_errors=True)
            if self._writer is not None:
                self._writer.flush()
        self._accelerator.wait_for_everyone()

    def log(self, record: dict[str, Any]) -> None:
        """Append a record, which has a `step`."""
        if not self._accelerator.is_main_process:
            return
        with self._log_file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        if self._writer is not None:
            write_record(self._writer, record)

    @property
    def _log_file(self) -> Path:
        return self.path / "log.jsonl"

    def _cut_log(self, step: int) -> None:
        """Drop records behind `step`: they will be written again."""
        lines = self._log_file.read_text().splitlines() if step else []
        fresh = self.path / "log.new"
        fresh.write_text("".join(line + "\n" for line in lines if _step_of(line) <= step))
        fresh.replace(self._log_file)


def _step_of(line: str) -> float:
    """The step of a log record; a line cut short by a kill belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
