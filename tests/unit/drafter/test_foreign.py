"""Folders of other projects given as a drafter: the sentence says what they are, and the way on where there is one."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from amphista.drafter import checkpoint
from amphista.drafter.checkpoint import load_proposer
from amphista.errors import DrafterError

CAUSAL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
MEDUSA = "amphista convert medusa {source} --target"
HYDRA = "Hydra.*convert hydra"
OTHER = "another kind of drafter, not supported"
WHOLE = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
INDEX = "model.safetensors.index.json"
FOLDERS = {
    "medusa by its configuration": ({"medusa_num_heads": 2}, {}, MEDUSA),
    "medusa by its file": (None, {"medusa_lm_head.pt": None}, MEDUSA),
    "medusa by its tensors": (CAUSAL, {"model.safetensors": ["medusa_head.0.0.linear.weight", *WHOLE]}, MEDUSA),
    "medusa by bare tensors": ({}, {"heads.safetensors": ["0.0.linear.weight", "0.1.weight"]}, MEDUSA),
    "medusa in shards": (CAUSAL, {INDEX: {"weight_map": {"medusa_head.0.0.linear.weight": "x"}}}, MEDUSA),
    "medusa of vllm": ({"model_type": "medusa", "architectures": ["MedusaModel"]}, {}, MEDUSA),
    "hydra": ({"hydra_num_heads": 2}, {}, HYDRA),
    "hydra by its file": (None, {"hydra_lm_head.safetensors": ["0.0.linear.weight"]}, HYDRA),
    "eagle 3": ({"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}, {}, "EAGLE.*" + OTHER),
    "eagle by its tensors": (CAUSAL, {"model.safetensors": ["fc.weight", "layers.0.mlp.up_proj.weight"]}, "EAGLE"),
    "eagle by its one layer": ({**CAUSAL, "num_hidden_layers": 1}, {"pytorch_model.bin": None}, "EAGLE"),
    "eagle of speculators": ({"speculators_model_type": "eagle3"}, {}, "EAGLE.*" + OTHER),
    "mlp speculator": ({"model_type": "mlp_speculator"}, {}, "speculator.*" + OTHER),
    "mlp speculator by its tensors": ({}, {"model.safetensors": ["speculator.head.0.weight"]}, "speculator.*" + OTHER),
    "a causal language model": (CAUSAL, {"model.safetensors": WHOLE}, "whole model.*llamaforcausallm.*--target"),
    "one of a single layer": ({**CAUSAL, "num_hidden_layers": 1}, {"model.safetensors": WHOLE}, "whole model"),
    "a peft adapter": (None, {"adapter_config.json": None, "adapter_model.safetensors": ["x"]}, "PEFT adapter.*merge"),
    "a folder of gguf": (None, {"model-Q4.gguf": None}, "GGUF.*--target"),
    "a training run": (None, {"log.jsonl": None, "best": None}, "training run.*{source}/best"),
    "anything else": ({"a": 1}, {}, "no drafter of ours.*neither a format nor a drafter"),
    "nothing": (None, {}, "holds no config.json: expected a drafter checkpoint"),
    "names that are none": ({"architectures": [3, None], "model_type": ["x"], "num_hidden_layers": "1"}, {}, "is "),
}


def write(folder, config, files):
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        if isinstance(content, list):
            save_file({tensor: torch.zeros(2, 2) for tensor in content}, folder / name)
        else:
            (folder / name).write_text("" if content is None else json.dumps(content))
    return folder


def told(name, target):
    with pytest.raises(DrafterError) as caught:
        load_proposer(name, target.spec, target.shared, target.fingerprint)
    return str(caught.value)


@pytest.mark.parametrize("case", FOLDERS)
def test_what_a_folder_is(target, tmp_path, case):
    config, files, wanted = FOLDERS[case]
    folder = write(tmp_path / "given", config, files)
    for name in (folder, str(folder), f"{folder}+lookup"):
        sentence = told(name, target)
        assert sentence.startswith(str(folder)), sentence
        assert re.search(wanted.format(source=folder), sentence), sentence
        assert ("convert" in sentence) is (wanted in (MEDUSA, HYDRA))


@pytest.mark.parametrize(
    ("name", "wanted"), [("x.gguf", "GGUF file"), ("model.safetensors", "expected a drafter's folder")]
)
def test_a_file_instead_of_a_folder(target, tmp_path, name, wanted):
    (tmp_path / name).write_bytes(b"")
    assert wanted in told(tmp_path / name, target)


def test_damaged_files_are_no_reason_to_fail(target, tmp_path):
    folder = write(tmp_path / "given", CAUSAL, {INDEX: [], "b.safetensors": None, "c.safetensors.index.json": {"x": 1}})
    (folder / INDEX).write_text("[" * 100_000)
    assert "whole model" in told(folder, target)


def test_of_a_hub_repository_only_the_configuration_is_fetched(target, tmp_path, monkeypatch):
    folder, asked = write(tmp_path / "snapshot", {"medusa_num_heads": 5}, {}), []
    monkeypatch.setattr(checkpoint, "fetch", lambda name, files, hub: asked.append(files) or folder)
    assert "amphista convert medusa owner/heads --target" in told("owner/heads", target)
    assert asked == [("config.json",)]


def test_the_target_itself(text_target, tmp_path):
    text_target.model.save_pretrained(tmp_path / "target")
    assert "whole model" in told(tmp_path / "target", text_target)
