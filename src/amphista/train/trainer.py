"""The training loop, on `accelerate`: frozen target, one drafter, resumable.

    amphista train --recipe recipes/smollm2-135m-amphista.toml --data answers.jsonl.gz --out runs/amphista

OUT/log.jsonl      one record per `log_every` steps, one per validation
OUT/state/         what resuming needs: weights, optimiser, schedule, progress (replaced atomically)
OUT/best/          the drafter with the highest validated tau at 16 nodes
OUT/last/          the drafter at the end
A killed run started again with the same command goes on from OUT/state and equals the uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from amphista import provenance
from amphista.config import as_dict, build
from amphista.drafter.base import Calibration, ParallelHeads
from amphista.drafter.card import write_card
from amphista.drafter.checkpoint import DRAFTERS, make_drafter, save_drafter
from amphista.errors import ConfigError, DataError
from amphista.target.loading import hub_name
from amphista.target.target import Target
from amphista.train.calibrate import calibrate
from amphista.train.config import OptimizerConfig, TrainConfig
from amphista.train.dataset import Batch, HiddenStates, collate, coverage, epoch_batches, frequent_tokens, split_rows
from amphista.train.init import started_from
from amphista.train.losses import HeadLoss
from amphista.train.prompts import read_rows
from amphista.train.rows import TokenRow
from amphista.train.validation import Validation, validate

BEST_BY_NODES = 16
Report = Callable[[str], None]
OnStep = Callable[[int, int, str], None]


@dataclass
class Progress:
    """Where a run stands; stored in OUT/state/progress.json."""

    step: int = 0
    positions: int = 0
    seconds: float = 0.0
    best_tau: float = 0.0


class Trainer:
    """One run: made from a target and a config, writes into a folder."""

    def __init__(
        self, target: Target, config: TrainConfig, out: Path, report: Report, on_step: OnStep | None = None
    ) -> None:
        self.target, self.config, self.out, self.report, self.on_step = target, config, out, report, on_step
        set_seed(config.seed)
        self.accelerator = Accelerator(
            cpu=target.device.type == "cpu",
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            step_scheduler_with_optimizer=False,
        )
        self.rows, self.validation_rows = self._read_rows()
        self.hidden = HiddenStates(target, [*self.rows, *self.validation_rows], self._store_folder())
        self.before: dict[str, Any] | None = None  # of the drafter this run goes on from
        self.drafter = self._make_drafter()
        self.steps_per_epoch = len(epoch_batches(self.rows, config.optimizer.batch_size, config.seed, 0))
        self.num_steps = self.steps_per_epoch * config.optimizer.epochs
        self.num_steps = min(self.num_steps, config.optimizer.max_steps or self.num_steps)
        optimizer = make_optimizer(self.drafter, config.optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(config.optimizer, self.num_steps))
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(
            HeadLoss(self.drafter, config.loss), optimizer, schedule
        )
        self.progress = Progress()
        self._measured: tuple[int, Calibration, dict[str, Any]] | None = None  # at which step, what

    # -- setting up -----------------------------------------------------------------------------------------------

    def _read_rows(self) -> tuple[list[TokenRow], list[TokenRow]]:
        data = self.config.data
        if not data.files:
            raise ConfigError("no training data: give --data FILE (or data.files in the recipe)")
        max_len = min(data.max_len, self.target.spec.max_positions)
        paths = [Path(name).expanduser() for name in data.files]
        rows = read_rows(
            paths,
            self.target.text,
            self.target.eos_ids,
            vocab_size=self.target.spec.vocab_size,
            max_len=max_len,
            fingerprint=self.target.fingerprint,
        )
        return split_rows(rows, data.validation_share, data.seed)

    def _store_folder(self) -> Path | None:
        return self.out.parent / "hidden-store" if self.config.data.store else None

    def _make_drafter(self) -> ParallelHeads:
        kind = self.config.drafter
        if kind not in DRAFTERS:
            raise ConfigError(f"unknown drafter {kind!r}: expected one of {', '.join(DRAFTERS)}")
        if self.config.init is not None:
            drafter, self.before = started_from(self.config, self.target)
            return drafter.to(self.accelerator.device)
        drafter_config = build(DRAFTERS[kind][0], self.config.model, "model")
        drafter = make_drafter(kind, drafter_config, self.target.spec, self.target.shared)
        if drafter_config.draft_vocab is not None:
            ids = frequent_tokens(self.rows, drafter_config.draft_vocab, sorted(self.target.eos_ids))
            drafter.set_draft_ids(ids)
        sample = self.hidden.get(self.rows[:8])
        drafter.match_scale(float(torch.cat(sample).pow(2).mean().sqrt()))
        return drafter.to(self.accelerator.device)

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self, stop_after: int | None = None) -> Path:
        """Train to the end (or for `stop_after` steps of this call); returns the folder of the final drafter."""
        self._resume()
        self.report(self._summary())
        started, spent = time.perf_counter(), self.progress.seconds
        for taken, batch in enumerate(islice(self._batches(), self.num_steps - self.progress.step), start=1):
            sums = self.model(batch.hidden, batch.next_ids, batch.answer_rows)
            loss, per_head = sums.loss(self.config.loss), sums.per_head()
            if not torch.isfinite(loss):
                raise DataError(
                    f"the loss is {float(loss)} at step {self.progress.step}: lower optimizer.learning_rate"
                )
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.progress.step += 1
            self.progress.positions += batch.answer_rows.rows.numel()
            self.progress.seconds = spent + time.perf_counter() - started
            self._after_step(float(loss.detach()), per_head)
            if taken == stop_after:
                return self.out / "state"
        return self._finish()

    def _batches(self) -> Iterator[Batch]:
        """All batches from where the run stands to the last epoch's end."""
        size = self.config.optimizer.batch_size
        for epoch in range(self.progress.step // self.steps_per_epoch, self.config.optimizer.epochs):
            skip = self.progress.step - epoch * self.steps_per_epoch
            for rows in epoch_batches(self.rows, size, self.config.seed, epoch)[skip:]:
                mine = rows[self.accelerator.process_index :: self.accelerator.num_processes] or rows[:1]
                yield collate(mine, self.hidden.get(mine)).to(self.accelerator.device)

    def _after_step(self, loss: float, per_head: torch.Tensor) -> None:
        step, config = self.progress.step, self.config
        if step % config.log_every == 0:
            record = {"step": step, "loss": loss, "head_loss": per_head.tolist(), **self._pace()}
            self._log(record)
            if self.on_step is not None:
                self.on_step(step, self.num_steps, f"loss {loss:.4f}  {self._time_left()}")
        if config.validate_every and step % config.validate_every == 0:
            self._validate()
        if step % config.save_every == 0:
            self._save_state()

    def _finish(self) -> Path:
        every = self.config.validate_every
        if not every or self.progress.step % every:
            self._validate()
        self._save_state()
        self._save_drafter(self.out / "last", self._calibrated())
        return self.out / "last"

    # -- validation, checkpoints, records -------------------------------------------------------------------------

    def _validate(self) -> Validation:
        self.drafter.eval()
        with self.accelerator.autocast():
            result = validate(self.drafter, self.validation_rows, self.hidden, self.config.loss)
        self.drafter.train()
        self._log({"step": self.progress.step, "validation": asdict(result), **self._pace()})
        self.report(f"validation at step {self.progress.step}: {result.line()}")
        tau = result.tau[BEST_BY_NODES]
        if tau > self.progress.best_tau:
            self.progress.best_tau = tau
            self._save_drafter(self.out / "best", self._calibrated())
        return result

    def _calibrated(self) -> dict[str, Any]:
        """Calibrate the drafter as it stands; the best one of the last step is not measured twice."""
        if self._measured is None or self._measured[0] != self.progress.step:
            rows, loss = self.validation_rows, self.config.loss
            with self.accelerator.autocast():
                self._measured = (self.progress.step, *calibrate(self.drafter, rows, self.hidden, loss))
        _, self.drafter.calibration, measured = self._measured
        return measured

    def _save_drafter(self, folder: Path, measured: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        recipe = as_dict(self.config)
        recipe["data"]["files"] = [Path(name).name for name in self.config.data.files]  # no one's folders
        training = {
            "recipe": recipe,
            "progress": asdict(self.progress),
            "data": self._data_record(),
            "validation": measured,
            "provenance": provenance.record(),
        }
        if self.before is not None:
            training["before"] = self.before
        card = write_card(self.drafter, hub_name(self.target.name), training, self.config.card)
        save_drafter(self.drafter, folder, self.target.fingerprint, card=card, training=training, dtype=torch.bfloat16)
        self.drafter.calibration = None

    def _data_record(self) -> dict[str, Any]:
        return {
            "files": [Path(name).name for name in self.config.data.files],
            "rows": len(self.rows),
            "answer_tokens": sum(row.num_answer_tokens for row in self.rows),
            "validation_rows": len(self.validation_rows),
            "validation_answer_tokens": sum(row.num_answer_tokens for row in self.validation_rows),
            "validation_coverage": coverage(self.validation_rows, self.drafter.draft_ids),
        }

    def _save_state(self) -> None:
        temporary = self.out / "state.new"
        shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.save_state(str(temporary))
        if self.accelerator.is_main_process:
            (temporary / "progress.json").write_text(json.dumps(asdict(self.progress)))
            (temporary / "config.json").write_text(json.dumps(self._identity()))
            old = self.out / "state.old"
            if (self.out / "state").exists():
                shutil.rmtree(old, ignore_errors=True)
                (self.out / "state").rename(old)
            temporary.rename(self.out / "state")
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        state = next((self.out / n for n in ("state", "state.old") if (self.out / n / "progress.json").is_file()), None)
        if state is None:
            (self.out / "log.jsonl").write_text("")
            return
        if json.loads((state / "config.json").read_text()) != json.loads(json.dumps(self._identity())):
            raise ConfigError(
                f"{self.out} holds a run with other settings, data or target: choose another --out or delete it"
            )
        self.accelerator.load_state(str(state))
        self.progress = Progress(**json.loads((state / "progress.json").read_text()))
        log = self.out / "log.jsonl"  # records after the saved step will be written again
        kept = [line for line in log.read_text().splitlines() if _step_of(line) <= self.progress.step]
        rewritten = self.out / "log.new"
        rewritten.write_text("".join(line + "\n" for line in kept))
        rewritten.replace(log)
        self.report(f"resuming at step {self.progress.step} of {self.num_steps}")

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it goes on from."""
        rows = json.dumps([(row.id, row.token_ids, row.answers) for row in [*self.rows, *self.validation_rows]])
        return {
            "config": {**as_dict(self.config), "card": None},  # a card may be worded anew in mid-run
            "rows_sha256": hashlib.sha256(rows.encode()).hexdigest(),
            "target": asdict(self.target.fingerprint),
        }

    def _log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.out / "log.jsonl").open("a") as stream:
                stream.write(json.dumps(record) + "\n")

    def _pace(self) -> dict[str, Any]:
        rate = self.schedule.get_last_lr()[0]
        return {"learning_rate": rate, "positions": self.progress.positions, "seconds": round(self.progress.seconds, 1)}

    def _time_left(self) -> str:
        pace = self.progress.seconds / max(self.progress.step, 1)
        minutes = pace * (self.num_steps - self.progress.step) / 60
        return f"{self.progress.positions / max(self.progress.seconds, 1e-9):.0f} positions/s, {minutes:.0f} min left"

    def _summary(self) -> str:
        weights = sum(p.numel() for p in self.drafter.parameters()) / 1e6
        record = self._data_record()
        return (
            f"{self.drafter.name} with {weights:.1f} M weights: {record['rows']} rows, {record['answer_tokens']} "
            f"answer tokens, {self.num_steps} steps; {record['validation_rows']} validation rows, "
            f"draft vocabulary covers {record['validation_coverage']:.1%} of their tokens"
        )


def _step_of(line: str) -> float:
    """The step of a log record; a line cut short by a kill belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def make_optimizer(drafter: ParallelHeads, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; norms, biases and position encodings are not decayed."""
    decayed = [p for name, p in drafter.named_parameters() if p.dim() > 1 and "position" not in name]
    plain = [p for name, p in drafter.named_parameters() if not (p.dim() > 1 and "position" not in name)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2))


def warmup_cosine(config: OptimizerConfig, num_steps: int) -> Callable[[int], float]:
    """The learning-rate factor by step."""
    warmup = min(config.warmup_steps, max(1, num_steps // 10))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    return factor
