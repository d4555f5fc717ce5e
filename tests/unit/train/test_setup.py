from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from amphista.errors import ConfigError
from amphista.train import setup
from amphista.train.config import DataConfig, OptimizerConfig, TrainConfig
from amphista.train.setup import _store_folder, configure_sharding, make_accelerator, warmup_cosine

STORED = TrainConfig(data=DataConfig(store=True))


def test_fsdp_that_would_be_none_is_refused(monkeypatch, tmp_path):
    """On CPU accelerate takes DDP without a word."""
    accelerator = make_accelerator(torch.device("cpu"), TrainConfig(), tmp_path)
    configure_sharding(accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="accelerate does not shard on cpu"):
        configure_sharding(accelerator)


def test_a_launcher_s_accumulation_does_not_divide_ours(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator(torch.device("cpu"), TrainConfig(), tmp_path).gradient_accumulation_steps == 1


def test_a_store_is_for_one_machine(monkeypatch):
    four = SimpleNamespace(num_processes=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert _store_folder(four, STORED, Path("runs/a")) == Path("runs/hidden-store")
    assert _store_folder(four, TrainConfig(), Path("runs/a")) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="4 processes, 2 of them on this machine"):
        _store_folder(four, STORED, Path("runs/a"))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'amphista\[train\]'"):
        make_accelerator(torch.device("cpu"), TrainConfig(tensorboard=True), tmp_path)


def test_no_part_is_refused():
    with pytest.raises(ConfigError, match="accumulate"):
        OptimizerConfig(accumulate=0)


def test_the_rate_rises_then_falls_along_a_cosine():
    factor = warmup_cosine(OptimizerConfig(warmup_steps=4, final_ratio=0.1), 104)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0 and factor(54) == pytest.approx(0.55) and factor(104) == pytest.approx(0.1)
