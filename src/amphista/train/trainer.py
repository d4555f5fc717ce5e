"""The training loop, on `accelerate`: frozen target, one drafter, any number of processes, resumable.

    amphista train --recipe recipes/smollm2-135m-amphista.toml --data answers.jsonl.gz --out runs/amphista
    accelerate launch --num_processes 2 -m amphista train --data answers.jsonl.gz --out runs/amphista

The law: a step's gradient is that of its whole batch, however the rows are split over processes and parts; and a killed
run, started again with the same command, equals the uninterrupted run. What lies in OUT: `run_folder.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from amphista.target.pages import trim_allocator
from amphista.target.target import Target
from amphista.train.config import TrainConfig
from amphista.train.dataset import PaddedBatch, answer_rows, collate, epoch_batches, idle_batch, part_of
from amphista.train.head_loss import HeadLoss, HeadSums
from amphista.train.memory import STEPS_TO_TRIM, keep_freed_memory
from amphista.train.not_finite import not_finite
from amphista.train.results import Results
from amphista.train.run_folder import Progress, RunFolder
from amphista.train.setup import assemble, is_sharded, make_optimizer, make_schedule
from amphista.train.token_row import TokenRow

LEAVE_AFTER_S = 1.0
Report = Callable[[str], None]
OnStep = Callable[[int, int, str], None]


class Trainer:
    """One run: made from a target and a config, writes into a folder."""

    def __init__(
        self, target: Target, config: TrainConfig, out: Path, report: Report, on_step: OnStep | None = None
    ) -> None:
        """report: lines for people; on_step: (steps done, of how many, a line), every `log_every` steps."""
        keep_freed_memory()
        self.config, self.out = config, out
        self.parts = parts = assemble(target, config, out)
        self.accelerator, self.drafter = parts.accelerator, parts.drafter
        is_main = self.accelerator.is_main_process
        self.report: Report = report if is_main else lambda line: None
        self.on_step = on_step if is_main else None
        self.steps_per_epoch = len(epoch_batches(parts.data.rows, config.optimizer.batch_size, config.seed, 0))
        self.num_steps = self.steps_per_epoch * config.optimizer.epochs
        self.num_steps = min(self.num_steps, config.optimizer.max_steps or self.num_steps)
        optimizer = make_optimizer(self.drafter, config.optimizer, on_one_device=not is_sharded(self.accelerator))
        schedule = make_schedule(optimizer, config.optimizer, self.num_steps)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(
            HeadLoss(self.drafter, config.loss, one_by_one=not is_sharded(self.accelerator)), optimizer, schedule
        )
        self.folder = RunFolder(out, self.accelerator, parts.identity(), tensorboard=config.tensorboard)
        self.results = Results(parts, self.model, out)
        self.progress = Progress()

    def run(self, stop_after: int | None = None) -> Path:
        """Train to the end (or for `stop_after` steps of this call); returns the folder of the final drafter.

        raises ConfigError where another process trains into the same folder, or it holds another run.
        """
        with self.folder.locked():
            return self._run(stop_after)

    def _run(self, stop_after: int | None) -> Path:
        self._begin()
        started, spent = time.perf_counter(), self.progress.seconds
        for taken, rows in enumerate(islice(self._batches(), self.num_steps - self.progress.step), start=1):
            self.drafter.at_step(self.progress.step, self.num_steps)
            sums = self._gradient(rows)
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.progress.step += 1
            self.progress.seconds = spent + time.perf_counter() - started
            self._after_step(sums)
            if taken == stop_after:
                return self.out / "state"
        return self._finish()

    def close(self) -> None:
        """Leave the other processes, if there are any; nothing can be trained in this one afterwards."""
        if self.accelerator.num_processes > 1:
            # gloo's threads need the GIL to drop the tensors of the last exchange. Destroying the group waits for them
            # and holds the GIL: too soon, and it waits for ever (torch 2.13; two runs in ten on a loaded machine).
            time.sleep(LEAVE_AFTER_S)
        self.accelerator.end_training()

    def _batches(self) -> Iterator[list[TokenRow]]:
        """The rows of every step from where the run stands to the last epoch's end."""
        size = self.config.optimizer.batch_size
        for epoch in range(self.progress.step // self.steps_per_epoch, self.config.optimizer.epochs):
            skip = self.progress.step - epoch * self.steps_per_epoch
            yield from epoch_batches(self.parts.data.rows, size, self.config.seed, epoch)[skip:]

    def _gradient(self, rows: list[TokenRow]) -> HeadSums:
        """Leave the gradient of these rows' loss on the drafter; the same on every process, however they are split.

        A mean would weight the parts wrongly: a part's sums are divided by the aims of the whole batch.
        """
        loss, count = self.config.loss, self.config.optimizer.accumulate
        whole = answer_rows(rows)
        aims = torch.tensor([float(whole.aims(k).numel()) for k in range(self.drafter.num_heads)])
        aims = aims.to(self.accelerator.device)
        sums = HeadSums(torch.zeros_like(aims), torch.zeros_like(aims), aims)
        for index in range(count):
            batch = self._part(rows, index)
            is_last = index == count - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                part = self.model(batch.hidden, batch.next_ids, batch.answer_rows)
                # Wrappers take the mean of the processes' gradients, and ours add up.
                self.accelerator.backward(part.weighted(aims, loss) * self.accelerator.num_processes)
            sums = HeadSums(sums.losses + part.losses.detach(), sums.counted + part.counted, aims)
        losses, counted = self.accelerator.reduce(torch.stack([sums.losses, sums.counted]), "sum")
        sums = HeadSums(losses, counted, aims)
        if not torch.isfinite(losses).all():
            raise not_finite(self.accelerator, self.model, rows, self.parts.hidden)
        weight = float(sums.weight(aims, loss))
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= weight
        self.progress.positions += whole.rows.numel()
        return sums

    def _part(self, rows: list[TokenRow], index: int) -> PaddedBatch:
        """One of this process's parts of a batch; every process has as many, some of them idle."""
        accelerator, count = self.accelerator, self.config.optimizer.accumulate
        share = part_of(rows, accelerator.process_index, accelerator.num_processes)
        some = part_of(share, index, count)
        batch = collate(some, self.parts.hidden.get(some)) if some else idle_batch(self.drafter.row_width)
        return batch.to(accelerator.device)

    def _begin(self) -> None:
        self.progress = self.folder.resume()
        weights = sum(p.numel() for p in self.drafter.parameters()) / 1e6
        self.report(
            f"{self.drafter.name} with {weights:.1f} M weights: {self.num_steps} steps, "
            f"{self.parts.data.summary(self.config, self.drafter)}"
        )
        if self.parts.hidden.store is not None:
            self.report(self.parts.hidden.store.about)
        if self.progress.step:
            self.report(f"resuming at step {self.progress.step} of {self.num_steps}")

    def _after_step(self, sums: HeadSums) -> None:
        step, config = self.progress.step, self.config
        if step % config.log_every == 0:
            loss = float(sums.loss(config.loss))
            self.folder.log({"step": step, "loss": loss, "head_loss": sums.per_head().tolist(), **self._pace()})
            if self.on_step is not None:
                self.on_step(step, self.num_steps, f"loss {loss:.4f}  {self._time_left()}")
        if config.validate_every and step % config.validate_every == 0:
            self._validate()
        if step % config.save_every == 0:
            self.folder.save_state(self.progress)
        if step % STEPS_TO_TRIM == 0:
            trim_allocator()

    def _validate(self) -> None:
        result = self.results.validate(self.progress)
        if result is not None:
            self.folder.log({"step": self.progress.step, "validation": asdict(result), **self._pace()})
            self.report(f"validation at step {self.progress.step}: {result.line()}")

    def _finish(self) -> Path:
        every = self.config.validate_every
        if not every or self.progress.step % every:
            self._validate()
        self.folder.save_state(self.progress)
        return self.results.save_last(self.progress)

    def _pace(self) -> dict[str, Any]:
        rate = self.schedule.get_last_lr()[0]
        return {"learning_rate": rate, "positions": self.progress.positions, "seconds": round(self.progress.seconds, 1)}

    def _time_left(self) -> str:
        pace = self.progress.seconds / max(self.progress.step, 1)
        minutes = pace * (self.num_steps - self.progress.step) / 60
        return f"{self.progress.positions / max(self.progress.seconds, 1e-9):.0f} positions/s, {minutes:.0f} min left"
