"""Results: measures the drafter of a run on its held-out rows; OUT/best is the best one so far, OUT/last the final one.

Both are complete checkpoints: calibrated, with provenance and card. The main process measures while the others wait.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from amphista import provenance
from amphista.drafter.base import Calibration
from amphista.drafter.card import write_card
from amphista.drafter.checkpoint import make_drafter, save_drafter
from amphista.drafter.scoring import ScoringDrafter
from amphista.target.loading import hub_name
from amphista.train.calibrate import calibrate
from amphista.train.run_folder import Progress
from amphista.train.setup import Parts, is_sharded
from amphista.train.validation import Validation, validate

BEST_BY_NODES = 16


class Results:
    """Every process calls every method."""

    def __init__(self, parts: Parts, model: torch.nn.Module, out: Path) -> None:
        """model: the prepared loss that holds the drafter."""
        self._parts, self._model, self._out = parts, model, out
        self._measured: tuple[int, Calibration, dict[str, Any]] | None = None  # at which step, what

    def validate(self, progress: Progress) -> Validation | None:
        """Measure the drafter and keep it in OUT/best if it is the best so far; None but on the main process."""
        parts, drafter, result = self._parts, self._whole_drafter(), None
        if parts.accelerator.is_main_process:
            drafter.eval()
            with parts.accelerator.autocast():
                result = validate(drafter, parts.data.validation_rows, parts.hidden, parts.config.loss)
            drafter.train()
            if result.tau[BEST_BY_NODES] > progress.best_tau:
                progress.best_tau = result.tau[BEST_BY_NODES]
                self._save(drafter, self._out / "best", progress)
        parts.accelerator.wait_for_everyone()
        return result

    def save_last(self, progress: Progress) -> Path:
        """Write the drafter as it stands to OUT/last."""
        drafter = self._whole_drafter()
        if self._parts.accelerator.is_main_process:
            self._save(drafter, self._out / "last", progress)
        self._parts.accelerator.wait_for_everyone()
        return self._out / "last"

    def _whole_drafter(self) -> ScoringDrafter:
        """The drafter with all its weights; where they are sharded, a copy on the main process (others: no use)."""
        parts = self._parts
        if not is_sharded(parts.accelerator):
            return parts.drafter
        weights = parts.accelerator.get_state_dict(self._model)  # gathered from all processes
        if not parts.accelerator.is_main_process:
            return parts.drafter
        copy = make_drafter(parts.drafter.name, parts.drafter.config, parts.target.spec, parts.target.shared)
        copy.load_state_dict({name.removeprefix("drafter."): weight for name, weight in weights.items()})
        return copy.to(parts.accelerator.device)

    def _save(self, drafter: ScoringDrafter, folder: Path, progress: Progress) -> None:
        """Calibrate and write; the best one of the last step is not measured twice."""
        parts, config = self._parts, self._parts.config
        if self._measured is None or self._measured[0] != progress.step:
            rows = parts.data.validation_rows
            with parts.accelerator.autocast():
                self._measured = (progress.step, *calibrate(drafter, rows, parts.hidden, config.loss))
        _, drafter.calibration, measured = self._measured
        recipe = asdict(config)
        recipe["data"]["files"] = [Path(name).name for name in config.data.files]  # no one's folders
        training = {
            "recipe": recipe,
            "progress": asdict(progress),
            "data": parts.data.record(config, drafter),
            "validation": measured,
            "provenance": provenance.record(),
            **({"before": parts.before} if parts.before is not None else {}),
        }
        card = write_card(drafter, hub_name(parts.target.name), training, config.card)
        fingerprint = parts.target.fingerprint
        save_drafter(drafter, folder, fingerprint, card=card, training=training, dtype=torch.bfloat16)
        drafter.calibration = None
