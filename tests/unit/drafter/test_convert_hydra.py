"""Published Hydra checkpoints give the logits that the published class gives, in both forms."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaModel

from amphista.drafter.checkpoint import load_drafter, save_drafter
from amphista.drafter.convert_hydra import read_hydra
from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.errors import DrafterError
from amphista.tree.grow import parse_tree
from tests.decoding import decode, heads_along
from tests.tiny import SIZES, VOCAB

D, K = 32, 3
IDS = [5, 17, 230, 44, 9, 61, 62, 63, 99, 100]


def layer_of_llama():
    """What Hydra++ calls its prefix embedding layer: a Llama model of one layer, whose norm stands behind it."""
    torch.manual_seed(3)
    model = LlamaModel(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def published_tensors(num_layers=2, *, is_plus=False, own=True):
    """Names of the Hydra repository: blocks stand after dropout in Hydra++, a repeated one under each of its names."""
    torch.manual_seed(1)
    tensors, step = {"input_embed_fn.weight": torch.zeros(VOCAB, D)}, 2 if is_plus else 1
    for k in range(K):
        inputs = D * (k + 2)
        shared = {"linear.weight": torch.randn(D, D) * 0.3, "linear.bias": torch.randn(D) * 0.1}
        first = {
            "linear.weight": torch.randn(D, inputs) * 0.2,
            "linear.bias": torch.randn(D) * 0.1,
            "res_connection.weight": torch.randn(D, inputs) * 0.2,
            "res_connection.bias": torch.randn(D) * 0.1,
        }
        for layer in range(num_layers):
            place = step * layer + step - 1
            block = shared if layer else first
            tensors |= {f"hydra_mlp.{k}.{place}.{name}": tensor.clone() for name, tensor in block.items()}
        if own:
            name = f"hydra_lm_head.{k}" + (".1" if is_plus else "")
            tensors |= {f"{name}.weight": torch.randn(VOCAB, D), f"{name}.bias": torch.randn(VOCAB)}
    if is_plus:
        tensors |= {f"prefix_embeding_layer.{name}": value for name, value in layer_of_llama().state_dict().items()}
    return tensors


def write(folder, tensors, name="hydra_lm_head.pt", **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"hydra_num_heads": K, "grounded_heads": True, **config}))
    if name.endswith(".pt"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)


def published_forward(target, tensors, hidden, tokens):
    """Logits [K, V] behind the last row of hidden states [T, D], where `tokens` follow, the pending one first."""
    base = hidden[-1]
    if any(name.startswith("prefix") for name in tensors):
        base = layer_of_llama()(inputs_embeds=hidden[None])[0][0, -1]
    logits = []
    for k in range(K):
        inputs = torch.cat([base, *(target.shared.embed(torch.tensor(token)) for token in tokens[: k + 1])])
        places = sorted({int(name.split(".")[2]) for name in tensors if name.startswith(f"hydra_mlp.{k}.")})
        for at, place in enumerate(places):
            block = {part: tensors[f"hydra_mlp.{k}.{place}.linear.{part}"] for part in ("weight", "bias")}
            moved = F.silu(F.linear(inputs, block["weight"], block["bias"]))
            if at == 0:
                name = f"hydra_mlp.{k}.{place}.res_connection"
                inputs = F.linear(inputs, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
            inputs = inputs + moved
        found = [name for name in tensors if name.startswith(f"hydra_lm_head.{k}.") and name.endswith("weight")]
        if found:
            logits.append(F.linear(inputs, tensors[found[0]], tensors[found[0].replace("weight", "bias")]))
        else:
            logits.append(target.shared.project(inputs))
    return torch.stack(logits)


@pytest.mark.parametrize("name", ["hydra_lm_head.pt", "hydra_lm_head.safetensors"])
@pytest.mark.parametrize(("is_plus", "num_layers", "own"), [(False, 1, True), (False, 2, False), (True, 4, True)])
def test_both_forms_are_the_published_forward(target, tmp_path, is_plus, num_layers, own, name):
    tensors = published_tensors(num_layers, is_plus=is_plus, own=own)
    write(tmp_path, tensors, name, base_model_name_or_path="lmsys/vicuna-7b-v1.3")
    published = read_hydra(str(tmp_path), target.spec, target.shared)
    drafter, ahead = published.drafter, [200, 7, 31]
    assert (published.base_model, published.file, published.dtype) == ("lmsys/vicuna-7b-v1.3", name, torch.float32)
    assert (drafter.config.base, drafter.config.num_layers) == ("prefix" if is_plus else "hidden", num_layers)
    hidden = target.hidden_states(torch.tensor([IDS]))[0].clone()
    next_ids = torch.tensor([*IDS[1:], ahead[0]])
    with torch.no_grad():
        expected = published_forward(target, tensors, hidden, ahead)
        text = torch.cat([hidden, hidden[:2]])[None], torch.cat([next_ids, torch.tensor(ahead[1:])])[None]
        training = drafter.head_logits(drafter.head_states(*text, torch.tensor([len(IDS) - 1]))[0])
        state = drafter.start()
        drafter.commit(state, hidden, next_ids)
        decoding = drafter.head_logits(heads_along(drafter, state, ahead[1:]))
    for logits in (training, decoding):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


def test_a_converted_drafter_decodes_and_is_saved(target, tmp_path):
    write(tmp_path / "theirs", published_tensors(is_plus=True))
    drafter = read_hydra(str(tmp_path / "theirs"), target.spec, target.shared).drafter
    save_drafter(drafter, tmp_path / "ours", target.fingerprint, card="", training={})
    loaded = load_drafter(str(tmp_path / "ours"), target.spec, target.shared, target.fingerprint)
    params = SamplingParams(max_new_tokens=16)
    expected = decode(Engine(target, Proposer(), parse_tree(1)), IDS[:4], params).output_ids
    assert decode(Engine(target, loaded, parse_tree(9)), IDS[:4], params).output_ids == expected


def without(tensors, part):
    return {name: value for name, value in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: without(t, "res_connection"), {}, "heads that read no tokens"),
        (lambda t: without(t, "hydra_mlp.1.1.linear.bias"), {}, "heads.1.1.linear.bias is missing"),
        (lambda t: without(t, "hydra_lm_head.2.bias"), {}, "own_bias.2 is missing"),
        (lambda t: t | {"hydra_mlp.0.9.extra.weight": torch.zeros(2)}, {}, "found hydra_mlp.0.9.extra.weight"),
        (
            lambda t: t | {"hydra_lm_head.0.weight": torch.zeros(7, D)},
            {},
            r"trained for vicuna: own_head.0 is .*\[7, 32\]",
        ),
        (lambda t: t, {"hidden_state_offset": 1}, "another layer's states"),
    ],
)
def test_what_cannot_be_read_is_refused(target, tmp_path, change, config, message):
    write(tmp_path, change(published_tensors()), base_model_name_or_path="vicuna", **config)
    with pytest.raises(DrafterError, match=message):
        read_hydra(str(tmp_path), target.spec, target.shared)


def test_an_empty_folder_is_refused(target, tmp_path):
    with pytest.raises(DrafterError, match="no published Hydra heads"):
        read_hydra(str(tmp_path), target.spec, target.shared)
