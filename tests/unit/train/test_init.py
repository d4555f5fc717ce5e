"""Going on from a trained drafter: same weights at step 0, same draft vocabulary, its history told; others refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from amphista.drafter.checkpoint import load_drafter, read_checkpoint
from amphista.errors import ConfigError
from amphista.train.config import DataConfig, OptimizerConfig, TrainConfig
from amphista.train.trainer import Trainer
from tests.tiny import EOS, tiny_target


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"id": str(i), "prompt_ids": [1, 2, i], "answer_ids": [9, i, 40, 2 * i, 9, EOS]} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(data, **values) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(files=(data,), validation_share=0.2),
        optimizer=OptimizerConfig(max_steps=2, batch_size=4, learning_rate=1e-2),
        **values,
    )


MODEL = {"num_heads": 2, "draft_vocab": 50, "intermediate_size": 16}


@pytest.fixture(scope="module")
def first(target, data, tmp_path_factory):
    return Trainer(target, config_of(data, model=MODEL), tmp_path_factory.mktemp("first") / "run", print).run()


def test_starts_where_the_other_ended(target, data, first, tmp_path):
    trainer = Trainer(target, config_of(data, init=str(first)), tmp_path / "run", print)
    stored = load_file(first / "model.safetensors")
    for name, tensor in trainer.drafter.state_dict().items():
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name
    assert all(p.requires_grad and p.dtype is torch.float32 for p in trainer.drafter.parameters())
    assert trainer.drafter.config.num_heads == 2
    again = trainer.run()
    assert any(not torch.equal(t, stored[n]) for n, t in load_file(again / "model.safetensors").items())


def test_taps_are_put_on_a_trained_drafter(target, data, first, tmp_path):
    """At step 0 it says what the other one says; a step later it reads them."""
    plain = load_drafter(str(first), target.spec, target.shared, target.fingerprint).float()
    trainer = Trainer(target, config_of(data, init=str(first), model={"taps": [1, 2]}), tmp_path / "run", print)
    ids, rows = torch.tensor([[5, 9, 40, 7]]), torch.arange(4)
    with torch.no_grad():
        hidden = target.hidden_states(ids, (1, 2)).clone()
        ours = trainer.drafter.head_states(hidden, ids.roll(-1), rows)
        theirs = plain.head_states(hidden[..., : target.spec.hidden_size], ids.roll(-1), rows)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    read = load_file(trainer.run() / "model.safetensors")["stages.0.fuse.weight"][:, 2 * target.spec.hidden_size :]
    assert read.shape[1] == 2 * target.spec.hidden_size and read.any()
    with pytest.raises(ConfigError, match="taps is"):
        settings = config_of(data, init=str(tmp_path / "run" / "last"), model={"taps": [2]})
        Trainer(target, settings, tmp_path / "again", print)


def test_history_adds_up(target, data, first, tmp_path):
    before = read_checkpoint(first).training["progress"]["positions"]
    second = Trainer(target, config_of(data, init=str(first)), tmp_path / "second", print).run()
    third = Trainer(target, config_of(data, init=str(second)), tmp_path / "third", print).run()
    history = read_checkpoint(third).training["before"]
    assert history["positions"] == before + read_checkpoint(second).training["progress"]["positions"]
    assert history["step"] == 4
    assert f"{history['positions']} positions in 4 steps" in (third / "README.md").read_text()


def test_another_kind_is_refused(target, data, first, tmp_path):
    with pytest.raises(ConfigError, match="of kind amphista: expected medusa"):
        Trainer(target, config_of(data, drafter="medusa", init=str(first)), tmp_path / "run", print)


def test_other_settings_are_refused_and_equal_ones_are_not(target, data, first, tmp_path):
    with pytest.raises(ConfigError, match="num_heads is 2, not 3"):
        Trainer(target, config_of(data, init=str(first), model={"num_heads": 3}), tmp_path / "run", print)
    Trainer(target, config_of(data, init=str(first), model=MODEL), tmp_path / "run", print)


def test_a_folder_that_no_drafter_may_be_saved_to_is_refused_before_the_first_step(target, data, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    steps = []
    trainer = Trainer(target, config_of(data, model=MODEL), tmp_path, steps.append)
    with pytest.raises(ConfigError, match="best is there already and is no drafter of ours"):
        trainer.run()
    assert not steps and (tmp_path / "best" / "config.json").read_text() == "{}"
