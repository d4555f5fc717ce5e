"""TrainConfig and its parts; a recipe file writes only what differs from these defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from amphista.drafter.card import CardConfig
from amphista.errors import ConfigError
from amphista.train.losses import LossConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`files`: distilled answers or conversations (train/prompts.py). `store`: keep hidden states on disk."""

    files: tuple[str, ...] = ()
    validation_share: float = 0.03
    max_len: int = 2048
    store: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1 or self.max_len < 2:
            raise ConfigError("data.validation_share must lie between 0 and 1, data.max_len be at least 2")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine to `final_ratio` of the peak over all steps.

    `max_steps` ends a run before its epochs do; the cosine ends there too. `batch_size`: rows a step, over all
    processes; each does its share in `accumulate` parts, one after the other, which changes memory and nothing else.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    beta2: float = 0.95
    clip: float = 1.0
    warmup_steps: int = 100
    final_ratio: float = 0.05
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 4
    accumulate: int = 1

    def __post_init__(self) -> None:
        if (
            self.learning_rate <= 0
            or self.epochs < 1
            or self.batch_size < 1
            or self.accumulate < 1
            or (self.max_steps is not None and self.max_steps < 1)
        ):
            raise ConfigError("learning_rate must be above 0, epochs, batch_size, accumulate and max_steps at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. `model` holds the drafter's own settings (AmphistaConfig or MedusaConfig).

    `precision` bf16 multiplies in bfloat16 and keeps weights, sums and the softmax in float32. `init`: go on from a
    trained drafter (a shipped name, a folder or a hub id) with its settings and draft vocabulary, a new optimiser and
    schedule; `model` may give it a path correction it had not. `freeze` heads: train the path correction alone.
    `tensorboard` writes the log a second time, for TensorBoard.
    """

    drafter: str = "amphista"
    init: str | None = None
    freeze: Literal["none", "heads"] = "none"
    precision: Literal["fp32", "bf16"] = "fp32"
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    card: CardConfig = field(default_factory=CardConfig)
    seed: int = 0
    save_every: int = 500
    validate_every: int = 0
    log_every: int = 20
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.freeze not in ("none", "heads"):
            raise ConfigError(f"freeze is {self.freeze!r}: expected 'none' or 'heads'")
        if self.save_every < 1 or self.log_every < 1 or self.validate_every < 0:
            raise ConfigError(
                "save_every and log_every must be at least 1, validate_every at least 0 (at the end only)"
            )
