"""What a training run is made of, from its config: accelerator, rows, hidden states, a fresh drafter, its optimizer."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed

from amphista.config import build
from amphista.drafter.checkpoint import DRAFTERS, make_drafter
from amphista.drafter.heads import with_paths
from amphista.drafter.scoring import ScoringDrafter
from amphista.errors import ConfigError
from amphista.target.target import Target
from amphista.train.config import OptimizerConfig, TrainConfig
from amphista.train.dataset import HiddenStates, coverage, frequent_tokens, split_rows
from amphista.train.left_out import LeftOut
from amphista.train.prompts import read_rows
from amphista.train.token_row import TokenRow
from amphista.train.warm_start import started_from

MAIN_MAY_TAKE = timedelta(hours=2)  # the others wait while one process validates; torch's default is 10 to 30 minutes


def make_accelerator(device: torch.device, config: TrainConfig, out: Path) -> Accelerator:
    """One process, or one of those that a launcher started; raises ConfigError where a package is missing."""
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("tensorboard = true needs the package tensorboard: pip install 'amphista[train]'")
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        step_scheduler_with_optimizer=False,
        # The parts of a step are ours: what a launcher's config file says of accumulation must not divide them again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=MAIN_MAY_TAKE)],
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=out,
    )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds all weights (FSDP)."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def configure_sharding(accelerator: Accelerator) -> None:
    """FSDP as the launcher's options say, as far as it can be had; raises ConfigError where it cannot."""
    if not is_sharded(accelerator):
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ConfigError(
                f"FSDP was asked for, but accelerate does not shard on {accelerator.device.type} "
                f"({accelerator.num_processes} processes): leave --use_fsdp out"
            )
        return
    if not accelerator.is_fsdp2:
        raise ConfigError("FSDP 1 was asked for: launch with --fsdp_version 2")
    # Every process makes the whole drafter anyway, from the seed, and sending it round fails at the draft vocabulary:
    # accelerate 1.15 takes each entry of the state for a sharded weight.
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False


@dataclass(frozen=True)
class RunData:
    """Rows to train on and rows held out."""

    rows: list[TokenRow]
    validation_rows: list[TokenRow]
    left_out: LeftOut

    def record(self, config: TrainConfig, drafter: ScoringDrafter) -> dict[str, Any]:
        """Of what a drafter was made, for its checkpoint."""
        return {
            "files": [Path(name).name for name in config.data.files],
            "rows": len(self.rows),
            "answer_tokens": sum(row.num_answer_tokens for row in self.rows),
            "validation_rows": len(self.validation_rows),
            "validation_answer_tokens": sum(row.num_answer_tokens for row in self.validation_rows),
            "validation_coverage": coverage(self.validation_rows, drafter.draft_ids),
            **({"left_out": self.left_out.record()} if self.left_out.count else {}),
        }

    def summary(self, config: TrainConfig, drafter: ScoringDrafter) -> str:
        """One line for people."""
        record = self.record(config, drafter)
        return (
            f"{record['rows']} rows, {record['answer_tokens']} answer tokens; {record['validation_rows']} validation "
            f"rows, draft vocabulary covers {record['validation_coverage']:.1%} of their tokens"
            + (f"; {self.left_out.sentence()}" if self.left_out.count else "")
        )


@dataclass(frozen=True)
class Parts:
    """Everything of a run that is there before its first step."""

    accelerator: Accelerator
    target: Target
    config: TrainConfig
    data: RunData
    hidden: HiddenStates
    drafter: ScoringDrafter
    before: dict[str, Any] | None  # of the drafter this run goes on from

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it goes on from: all that touches a weight.

        Not the wording of the card, nor how the same sums are split and shown, nor where the rows lie; FSDP, since its
        state has another form.
        """
        config = asdict(self.config)
        del config["card"], config["tensorboard"], config["optimizer"]["accumulate"], config["data"]["files"]
        rows = hashlib.sha256()
        for row in [*self.data.rows, *self.data.validation_rows]:
            rows.update(json.dumps([row.id, row.token_ids, row.answers]).encode())
        return {
            "config": config,
            "rows_sha256": rows.hexdigest(),
            "target": self.target.identity,
            **({"sharded": True} if is_sharded(self.accelerator) else {}),
        }


def assemble(target: Target, config: TrainConfig, out: Path) -> Parts:
    """Read, check and make; raises DataError naming file and line, ConfigError for what cannot be."""
    set_seed(config.seed)
    accelerator = make_accelerator(target.device, config, out)
    configure_sharding(accelerator)
    data = _read_data(target, config)
    every_row = [*data.rows, *data.validation_rows]
    drafter, before = _first_drafter(target, config, data.rows)
    if drafter.probes is not None and is_sharded(accelerator):
        raise ConfigError(
            f"{drafter.name} lends its weights to the target, which cannot read them sharded: leave FSDP out"
        )
    with accelerator.main_process_first():  # which makes the store that the others then open
        hidden = HiddenStates(target, every_row, _store_folder(accelerator, config, out), drafter)
    if before is None:
        with torch.no_grad():
            sample = torch.cat(hidden.get(data.rows[:8]))[:, : target.spec.hidden_size]
        drafter.match_scale(float(sample.pow(2).mean().sqrt()))
    if config.freeze == "heads":
        corrected = with_paths(drafter)
        if corrected is None:
            raise ConfigError("freeze = 'heads' leaves nothing to train: give the drafter a model.path_rank")
        corrected.freeze_heads()
    return Parts(accelerator, target, config, data, hidden, drafter.to(accelerator.device), before)


def _store_folder(accelerator: Accelerator, config: TrainConfig, out: Path) -> Path | None:
    if not config.data.store:
        return None
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    if on_this_machine != accelerator.num_processes:
        raise ConfigError(
            f"data.store = true with {accelerator.num_processes} processes, {on_this_machine} of them on this machine: "
            "the store is for one machine; train with data.store=false"
        )
    return out.parent / "hidden-store"


def _read_data(target: Target, config: TrainConfig) -> RunData:
    """The files' rows, split; raises DataError naming file and line."""
    data = config.data
    if not data.files:
        raise ConfigError("no training data: give --data FILE (or data.files in the recipe)")
    left_out = LeftOut()
    rows = read_rows(
        [Path(name).expanduser() for name in data.files],
        target.text,
        target.eos_ids,
        vocab_size=target.spec.vocab_size,
        max_len=min(data.max_len, target.spec.max_positions),
        fingerprint=target.fingerprint,
        left_out=left_out,
    )
    return RunData(*split_rows(rows, data.validation_share, data.seed), left_out)


def _first_drafter(
    target: Target, config: TrainConfig, rows: list[TokenRow]
) -> tuple[ScoringDrafter, dict[str, Any] | None]:
    """The drafter at step 0, and what came before where it goes on from another one.

    A fresh one has its draft vocabulary from the rows; its scale, from the target's hidden states, is still to come.
    """
    kind = config.drafter
    if kind not in DRAFTERS:
        raise ConfigError(f"unknown drafter {kind!r}: expected one of {', '.join(DRAFTERS)}")
    if config.init is not None:
        return started_from(config, target)
    drafter_config = build(DRAFTERS[kind][0], config.model, "model")
    drafter = make_drafter(kind, drafter_config, target.spec, target.shared)
    if drafter_config.draft_vocab is not None:
        drafter.set_draft_ids(frequent_tokens(rows, drafter_config.draft_vocab, sorted(target.eos_ids)))
    return drafter, None


def make_optimizer(
    drafter: ScoringDrafter, config: OptimizerConfig, *, on_one_device: bool = True
) -> torch.optim.Optimizer:
    """AdamW, fused where no weight is shared out; norms, biases and position encodings are not decayed."""
    trained = [(name, p) for name, p in drafter.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.dim() > 1 and "position" not in name]
    plain = [p for name, p in trained if not (p.dim() > 1 and "position" not in name)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = {"fused": True} if on_one_device else {}
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), **fused)


def make_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine over what is left of `num_steps`."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(config, num_steps))


def warmup_cosine(config: OptimizerConfig, num_steps: int) -> Callable[[int], float]:
    """The learning-rate factor by step."""
    warmup = min(config.warmup_steps, max(1, num_steps // 10))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    return factor
