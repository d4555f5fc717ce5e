"""bf16 training on a target that runs fast in float32: each keeps its own precision, and measures about the same."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from amphista.drafter.checkpoint import read_checkpoint
from amphista.train.config import DataConfig, OptimizerConfig, TrainConfig
from amphista.train.trainer import Trainer
from amphista.train.validation import exact_logits
from tests.tiny import EOS, tiny_target


def test_bf16_validates_and_calibrates_like_float32(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": str(i), "prompt_ids": [1, 2, i], "answer_ids": [9, i, 40, 2 * i, 9, EOS]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = tiny_target()
    assert target.speed_up()
    measured = {}
    for precision in ("fp32", "bf16"):
        config = TrainConfig(
            precision=precision,
            model={"num_heads": 2},
            data=DataConfig(files=(str(path),), validation_share=0.3),
            optimizer=OptimizerConfig(epochs=2, learning_rate=3e-3),
        )
        AcceleratorState._reset_state()  # one process has one precision, says accelerate
        checkpoint = read_checkpoint(Trainer(target, config, tmp_path / precision, print).run())
        measured[precision] = checkpoint.training["validation"]["sampled"]["tau"]["16"]
    AcceleratorState._reset_state()
    assert measured["bf16"] == pytest.approx(measured["fp32"], rel=0.15)
    assert measured["bf16"] > 1


def test_ranks_are_decided_in_float32(target):
    """Logits a 32nd apart are one number in bfloat16 at this size."""
    from amphista.drafter.medusa import Medusa, MedusaConfig

    drafter = Medusa(MedusaConfig(num_heads=1), target.spec, target.shared)
    states = torch.randn(50, target.spec.hidden_size)
    expected = drafter.head_logits(states, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(drafter.head_logits(states, 0).float(), expected)
        assert torch.equal(exact_logits(drafter, states, 0), expected)
