"""One of several training processes, started by torchrun: train, stop, train on.

    torchrun --nproc-per-node 2 tests/system/train_worker.py TARGET CONFIG.json OUT STOPS [fsdp]

STOPS are steps per call of `run`, separated by commas; 0 is to the end. With `fsdp`, FSDP2 on CPU: accelerate chooses
DDP for CPU processes, so that one choice is taken out of its hands; all that follows from it is its own code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from amphista.config import build
from amphista.target.loading import load_target
from amphista.train import setup
from amphista.train.config import TrainConfig
from amphista.train.trainer import Trainer

make_accelerator = setup.make_accelerator


def sharding_accelerator(device, config, out):
    made = make_accelerator(device, config, out)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["TransformerLayer", "ResidualBlock"],
        cpu_ram_efficient_loading=True,  # the default of `accelerate launch`
    )
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    assert made.is_fsdp2
    return made


def main():
    torch.set_num_threads(1)
    target_folder, config_file, out, stops, *kind = sys.argv[1:]
    if kind == ["fsdp"]:
        setup.make_accelerator = sharding_accelerator
    target = load_target(target_folder, device="cpu")
    config = build(TrainConfig, json.loads(Path(config_file).read_text()))
    for stop in map(int, stops.split(",")):
        trainer = Trainer(target, config, Path(out), lambda line: print(line, file=sys.stderr))
        trainer.run(stop_after=stop or None)
        sharded = {type(p).__name__ for p in trainer.model.parameters()} == {"DTensor"}
        assert sharded == (kind == ["fsdp"]), "not what was asked for"
    trainer.close()


if __name__ == "__main__":
    main()
