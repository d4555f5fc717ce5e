"""Published Medusa heads in every layout, made here by hand from random weights: the converted drafter's logits are
those of the published forward, its head k is their head k, and nothing in a file is executed.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from amphista.drafter import convert
from amphista.drafter.checkpoint import load_drafter, save_drafter
from amphista.drafter.convert import read_medusa
from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.errors import DrafterError
from amphista.tree.grow import parse_tree
from tests.decoding import decode
from tests.tiny import VOCAB, tiny_target

K, D = 3, 32


def random_heads(num_layers=1, num_heads=K, rows=VOCAB, own=True, dtype=torch.float32):
    """[(blocks [(weight, bias)], LM head or None)] per head."""
    draw = lambda *shape: (torch.randn(*shape) * 0.3).to(dtype)  # noqa: E731
    blocks = [[(draw(D, D), draw(D)) for _ in range(num_layers)] for _ in range(num_heads)]
    return [(of_head, draw(rows, D) if own else None) for of_head in blocks]


def published_forward(heads, hidden, lm_head=None):
    """h <- h + SiLU(W h + b), block after block, then the head's own linear map (else the target's): [T, K, N]."""
    logits = []
    for blocks, own in heads:
        h = hidden
        for weight, bias in blocks:
            z = h @ weight.float().T + (0 if bias is None else bias.float())
            h = h + z * torch.sigmoid(z)
        logits.append(h @ (lm_head if own is None else own.float()).T)
    return torch.stack(logits, dim=-2)


def sequential_names(heads, prefix=""):
    """The names of a list of Sequential(ResBlock x L, Linear)."""
    tensors = {}
    for k, (blocks, own) in enumerate(heads):
        for layer, (weight, bias) in enumerate(blocks):
            tensors[f"{prefix}{k}.{layer}.linear.weight"] = weight
            tensors[f"{prefix}{k}.{layer}.linear.bias"] = bias
        if own is not None:
            tensors[f"{prefix}{k}.{len(blocks)}.weight"] = own
    return tensors


def vllm_names(heads, prefix=""):
    tensors = {}
    for k, (blocks, own) in enumerate(heads):
        for layer, (weight, bias) in enumerate(blocks):
            tensors[f"{prefix}blocks.{k}.layers.{layer}.weight"] = weight
            if bias is not None:
                tensors[f"{prefix}blocks.{k}.layers.{layer}.bias"] = bias
        if own is not None:
            tensors[f"{prefix}lm_heads.{k}.weight"] = own
    return tensors


def write_config(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))


def write_pt(folder, heads, **config):
    write_config(folder, **{"medusa_num_heads": len(heads), "medusa_num_layers": len(heads[0][0]), **config})
    torch.save(sequential_names(heads), folder / "medusa_lm_head.pt")


def write_safetensors(folder, heads, **config):
    write_config(folder, **{"medusa_num_heads": len(heads), "medusa_num_layers": len(heads[0][0]), **config})
    save_file(sequential_names(heads), folder / "medusa_lm_head.safetensors")


def write_whole_model(folder, heads):
    """Two shards: the heads beside the model's own tensors, whose names would read like a vLLM head's at a glance."""
    write_config(folder, architectures=["LlamaForCausalLM"], hidden_size=D, num_hidden_layers=2, vocab_size=VOCAB)
    tensors = sequential_names(heads, "medusa_head.")
    own = {"lm_head.weight": torch.randn(VOCAB, D), "model.layers.0.self_attn.q_proj.weight": torch.randn(D, D)}
    half = dict(list(tensors.items())[: len(tensors) // 2])
    shards = {"a.safetensors": {**half, **own}, "b.safetensors": {n: t for n, t in tensors.items() if n not in half}}
    for name, shard in shards.items():
        save_file(shard, folder / name)
    index = {name: file for file, shard in shards.items() for name in shard} | {
        "model.norm.weight": "absent.safetensors"
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def write_vllm(folder, heads, prefix="medusa_heads.", **config):
    write_config(folder, model_type="medusa", num_heads=len(heads), num_hidden_layers=len(heads[0][0]), **config)
    save_file(vllm_names(heads, prefix), folder / "model.safetensors")


WRITERS = {
    "pt": write_pt,
    "safetensors": write_safetensors,
    "whole-model": write_whole_model,
    "vllm": write_vllm,
    "vllm-plain": lambda folder, heads: write_vllm(folder, heads, prefix=""),
}


def converted(folder, target):
    return read_medusa(str(folder), target.spec, target.shared).drafter


def both_forms(drafter, hidden):
    """Logits [T, K, N] of the training form, and of the decoding form row by row."""
    ids = torch.zeros(len(hidden), dtype=torch.long)
    with torch.no_grad():
        training = drafter.head_logits(drafter.head_states(hidden[None], ids[None], torch.arange(len(hidden))))
        state, decoding = drafter.start(), []
        for row in hidden:
            drafter.commit(state, row[None], ids[:1])
            decoding.append(drafter.head_logits(drafter.draft_states([state])[0]))
    return training, torch.stack(decoding)


def check_forward(drafter, expected, hidden):
    for logits in both_forms(drafter, hidden):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


# -- the published forward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("layout", WRITERS)
def test_logits_are_those_of_the_published_forward(target, tmp_path, layout, num_layers):
    heads, hidden = random_heads(num_layers), torch.randn(6, D)
    WRITERS[layout](tmp_path, heads)
    drafter = converted(tmp_path, target)
    assert (drafter.num_heads, drafter.config.num_layers, drafter.config.lm_head) == (K, num_layers, "own")
    check_forward(drafter, published_forward(heads, hidden), hidden)


@pytest.mark.parametrize("layout", WRITERS)
def test_heads_without_lm_heads_read_the_targets(target, tmp_path, layout):
    heads, hidden = random_heads(own=False), torch.randn(6, D)
    WRITERS[layout](tmp_path, heads)
    drafter = converted(tmp_path, target)
    assert drafter.config.lm_head == "shared"
    check_forward(drafter, published_forward(heads, hidden, target.shared.head_weight), hidden)


def test_the_original_lm_head_of_vllm_is_the_targets(target, tmp_path):
    heads, hidden = random_heads(own=False), torch.randn(6, D)
    write_vllm(tmp_path, heads, original_lm_head=True)
    copied = {**load_file(tmp_path / "model.safetensors"), "medusa_heads.lm_head.weight": torch.zeros(VOCAB, D)}
    save_file(copied, tmp_path / "model.safetensors")
    check_forward(converted(tmp_path, target), published_forward(heads, hidden, target.shared.head_weight), hidden)


def test_blocks_without_bias(target, tmp_path):
    heads = [([(weight, None) for weight, _ in blocks], own) for blocks, own in random_heads()]
    write_vllm(tmp_path, heads)
    hidden = torch.randn(6, D)
    check_forward(converted(tmp_path, target), published_forward(heads, hidden), hidden)


def test_a_repeated_block_stored_once_is_repeated(target, tmp_path):
    """The published class repeats one block object; a format that stores an object once keeps block 0 alone."""
    once = random_heads()
    repeated = [(blocks * 2, own) for blocks, own in once]
    write_config(tmp_path, medusa_num_heads=K, medusa_num_layers=2)
    stored = {name: tensor for name, tensor in sequential_names(repeated).items() if ".1.linear" not in name}
    save_file(stored, tmp_path / "medusa_lm_head.safetensors")
    drafter, hidden = converted(tmp_path, target), torch.randn(6, D)
    assert drafter.config.num_layers == 2
    check_forward(drafter, published_forward(repeated, hidden), hidden)


@pytest.mark.parametrize("full_rows", [False, True], ids=["gathered", "full"])
def test_a_token_map_is_the_draft_vocabulary(target, tmp_path, full_rows):
    """vLLM's truncated vocabulary, in its own order; LM heads over all tokens are gathered by it."""
    ids = torch.randperm(VOCAB)[:40]
    heads, hidden = random_heads(rows=VOCAB if full_rows else 40), torch.randn(6, D)
    write_vllm(tmp_path, heads, vocab_size=VOCAB, truncated_vocab_size=40)
    save_file({**load_file(tmp_path / "model.safetensors"), "token_map": ids}, tmp_path / "model.safetensors")
    drafter = converted(tmp_path, target)
    assert drafter.draft_ids.tolist() == sorted(ids.tolist())
    order = ids[ids.argsort()] if full_rows else ids.argsort()
    check_forward(drafter, published_forward(heads, hidden)[..., order], hidden)


def test_head_k_is_the_published_head_k(target, tmp_path):
    """Heads that know the future in the published convention (head k: x_{t+2+k} from h_t) are accepted throughout."""
    prompt = [5, 17, 230, 44, 9]
    params = SamplingParams(max_new_tokens=20)
    answer = decode(Engine(target, Proposer(), parse_tree(1)), prompt, params).output_ids
    ids = prompt + answer
    assert len(ids) <= D, "more positions than dimensions: no linear map could tell them apart"
    hidden = target.hidden_states(torch.tensor([ids]))[0].clone()
    heads = []
    for k in range(K):
        wanted = torch.zeros(len(ids), VOCAB)
        for t in range(len(ids) - 2 - k):
            wanted[t, ids[t + 2 + k]] = 20.0
        heads.append(
            ([(torch.zeros(D, D), torch.zeros(D))], torch.linalg.lstsq(hidden, wanted).solution.T.contiguous())
        )
    write_pt(tmp_path, heads)
    sequence = decode(Engine(target, converted(tmp_path, target), parse_tree("chain")), prompt, params)
    assert sequence.output_ids == answer
    assert set(sequence.stats.accepted[:-1]) == {K}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_converted_heads_are_lossless_under_a_real_tree(target, tmp_path, temperature):
    write_pt(tmp_path, random_heads(2))
    params = SamplingParams(max_new_tokens=24, temperature=temperature, seed=3)
    expected = decode(Engine(target, Proposer(), parse_tree(1)), [5, 17, 230], params).output_ids
    sequence = decode(Engine(target, converted(tmp_path, target), parse_tree(200)), [5, 17, 230], params)
    assert sequence.output_ids == expected and sum(sequence.stats.accepted) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_keep_their_bits_and_their_size_on_disk(target, tmp_path, dtype):
    heads = random_heads(dtype=dtype)
    write_safetensors(tmp_path / "theirs", heads, base_model_name_or_path="lmsys/vicuna-7b-v1.3")
    published = read_medusa(str(tmp_path / "theirs"), target.spec, target.shared)
    assert (published.source, published.file) == ("theirs", "medusa_lm_head.safetensors")
    assert published.base_model == "lmsys/vicuna-7b-v1.3" and published.dtype is dtype
    save_drafter(published.drafter, tmp_path / "ours", target.fingerprint, card="", training={}, dtype=published.dtype)
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    for k, (blocks, own) in enumerate(heads):
        assert torch.equal(stored["own_head"][k], own)
        assert torch.equal(stored[f"heads.{k}.0.linear.weight"], blocks[0][0])
        assert torch.equal(stored[f"heads.{k}.0.linear.bias"], blocks[0][1])
    loaded = load_drafter(str(tmp_path / "ours"), target.spec, target.shared, target.fingerprint)
    hidden = torch.randn(6, D)
    check_forward(loaded, published_forward(heads, hidden), hidden)


def test_a_target_with_a_biased_lm_head(tmp_path):
    """Published LM heads have no bias, whatever the target's has."""
    from torch import nn

    from amphista.target.spec import LogitTransform, SharedWeights

    target = tiny_target()
    biased = SharedWeights(target.model.get_input_embeddings(), nn.Linear(D, VOCAB), LogitTransform())
    heads, hidden = random_heads(), torch.randn(6, D)
    write_pt(tmp_path, heads)
    drafter = read_medusa(str(tmp_path), target.spec, biased).drafter
    check_forward(drafter, published_forward(heads, hidden), hidden)


def test_the_licence_comes_from_the_published_card(target, tmp_path):
    write_pt(tmp_path, random_heads())
    assert read_medusa(str(tmp_path), target.spec, target.shared).license is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Theirs\n")
    assert read_medusa(str(tmp_path), target.spec, target.shared).license == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert read_medusa(str(tmp_path), target.spec, target.shared).license is None


def test_a_hub_id_is_fetched(target, tmp_path, monkeypatch):
    write_pt(tmp_path, random_heads())
    asked = []
    monkeypatch.setattr(
        "amphista.drafter.published.fetch", lambda name, patterns: asked.append((name, patterns)) or tmp_path
    )
    published = read_medusa("owner/name", target.spec, target.shared)
    assert published.source == "owner/name" and asked == [("owner/name", convert.HUB_FILES)]


# -- nothing is executed ----------------------------------------------------------------------------------------------


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_never_run(target, tmp_path):
    write_pt(tmp_path, random_heads())
    torch.save(
        {**sequential_names(random_heads()), "extra": _Trap(tmp_path / "sprung")}, tmp_path / "medusa_lm_head.pt"
    )
    with pytest.raises(DrafterError, match="never executed"):
        converted(tmp_path, target)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "medusa_lm_head.pt", weights_only=False)  # the trap is a real one
    assert (tmp_path / "sprung").is_dir()


def test_a_file_from_before_torch_1_6_is_read(target, tmp_path):
    heads, hidden = random_heads(), torch.randn(6, D)
    write_pt(tmp_path, heads)
    torch.save(sequential_names(heads), tmp_path / "medusa_lm_head.pt", _use_new_zipfile_serialization=False)
    check_forward(converted(tmp_path, target), published_forward(heads, hidden), hidden)


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(folder, target, message):
    with pytest.raises(DrafterError, match=message) as caught:
        converted(folder, target)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sign", ["config", "file", "tensors"])
def test_hydra_is_refused_by_name(target, tmp_path, sign):
    write_pt(tmp_path, random_heads())
    if sign == "config":
        write_config(tmp_path, hydra_num_heads=4, hydra_num_layers=4)
    elif sign == "file":
        (tmp_path / "medusa_lm_head.pt").rename(tmp_path / "hydra_lm_head.pt")
    else:
        torch.save({"hydra_mlp.0.1.linear.weight": torch.zeros(D, D)}, tmp_path / "medusa_lm_head.pt")
    refused(tmp_path, target, "is a Hydra checkpoint.*convert hydra")


def test_a_target_of_another_hidden_size_is_refused(tmp_path):
    write_pt(tmp_path, random_heads(), base_model_name_or_path="lmsys/vicuna-7b-v1.3")
    other = tiny_target(hidden_size=16)
    refused(tmp_path, other, r"shape \[32, 32\].*hidden size 16.*trained for lmsys/vicuna-7b-v1.3")


def test_a_target_of_another_vocabulary_is_refused(tmp_path):
    write_pt(tmp_path, random_heads())
    refused(tmp_path, tiny_target(vocab_size=320), r"shape \[300, 32\].*320 tokens.*give the target")


def test_a_token_map_beyond_the_target_is_refused(target, tmp_path):
    write_vllm(tmp_path, random_heads(rows=2), truncated_vocab_size=2)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "token_map": torch.tensor([1, VOCAB])}, tmp_path / "model.safetensors")
    refused(tmp_path, target, "token_map names tokens beyond the target's 300")


def test_a_target_that_scales_its_logits_is_refused(tmp_path):
    write_pt(tmp_path, random_heads())
    refused(tmp_path, tiny_target("gemma2"), "gemma2.* scales or caps its logits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("1.0.linear.weight"), "lacks block 0 of head 1"),
        (lambda t: t.pop("2.0.linear.bias"), "lacks the bias of block 0 of head 2"),
        (lambda t: t.pop("0.1.weight"), "lacks the LM head of head 0"),
        (lambda t: t.update({"3.1.weight": torch.zeros(VOCAB, D)}), "lacks blocks for some of its LM heads"),
        (lambda t: t.update({"0.0.linear.weight": torch.zeros(D, D, dtype=torch.int8)}), "torch.int8"),
        (lambda t: t.update({"0.0.linear.bias": torch.zeros(D + 1)}), r"bias of head 0 has shape \[33\]"),
        (lambda t: t.update({"0.1.weight": torch.zeros(D)}), r"LM head of head 0 has shape \[32\]"),
        (lambda t: t.update({"fc.weight": torch.zeros(D)}), "holds no Medusa heads.*found fc.weight"),
        (lambda t: t.clear(), "holds no Medusa heads.*found nothing of the kind"),
    ],
)
def test_incomplete_or_foreign_tensors_are_refused_by_name(target, tmp_path, change, message):
    tensors = sequential_names(random_heads())
    change(tensors)
    write_config(tmp_path)
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    refused(tmp_path, target, message)


STATED = [("medusa_num_heads", 5), ("medusa_num_heads", 2), ("medusa_num_heads", "three"), ("medusa_num_heads", [3])]
STATED += [("medusa_num_layers", 2), ("medusa_num_layers", 0), ("num_heads", 4), ("hidden_size", 4096)]


@pytest.mark.parametrize(("key", "said"), STATED)
def test_the_tensors_decide_where_the_configuration_is_of_another_file(target, tmp_path, caplog, key, said):
    """As in folders published with the counts of a training script's defaults; one line says so."""
    heads, hidden = random_heads(), torch.randn(6, D)
    write_pt(tmp_path, heads)
    write_config(tmp_path, **{key: said})
    drafter = converted(tmp_path, target)
    assert (drafter.num_heads, drafter.config.num_layers) == (K, 1)
    check_forward(drafter, published_forward(heads, hidden), hidden)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the file decides" in line and f"its config.json says {said!r}" in line


@pytest.mark.parametrize("values", [{}, {"medusa_num_heads": K, "medusa_num_layers": 1, "hidden_size": D}])
def test_a_configuration_that_agrees_is_not_mentioned(target, tmp_path, caplog, values):
    write_pt(tmp_path, random_heads())
    write_config(tmp_path, **values)
    assert converted(tmp_path, target).num_heads == K and not caplog.records


@pytest.mark.parametrize("base_model", [5, ["a"], {}, ""])
def test_a_base_model_that_is_no_name(target, tmp_path, base_model):
    write_pt(tmp_path, random_heads())
    write_config(tmp_path, base_model_name_or_path=base_model)
    assert read_medusa(str(tmp_path), target.spec, target.shared).base_model is None


def whole_bin(folder, heads):
    torch.save(prefixed(heads), folder / "pytorch_model.bin")


def whole_bin_shards(folder, heads):
    names = prefixed(heads)
    torch.save(names, folder / "b.bin")
    torch.save({"model.norm.weight": torch.zeros(D)}, folder / "a.bin")
    write_index(folder, "pytorch_model.bin", {**dict.fromkeys(names, "b.bin"), "model.norm.weight": "a.bin"})


def bare_shards(folder, heads):
    names = sequential_names(heads)
    for number, name in enumerate(names):
        save_file({name: names[name]}, folder / f"{number}.safetensors")
    write_index(
        folder, "medusa_lm_head.safetensors", {name: f"{number}.safetensors" for number, name in enumerate(names)}
    )


def prefixed(heads):
    return {f"medusa_head.{name}": tensor for name, tensor in sequential_names(heads).items()}


def write_index(folder, name, weight_map):
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("write", [whole_bin, whole_bin_shards, bare_shards])
def test_other_files_of_the_same_tensors(target, tmp_path, write):
    heads, hidden = random_heads(2), torch.randn(6, D)
    write(tmp_path, heads)
    check_forward(converted(tmp_path, target), published_forward(heads, hidden), hidden)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/{}/out.safetensors", "a/../../out.safetensors", "..", 3, None]
)
def test_shards_outside_the_folder_are_refused(target, tmp_path, name):
    folder, names = tmp_path / "theirs", prefixed(random_heads())
    folder.mkdir()
    save_file(names, tmp_path / "out.safetensors")
    name = name.format(tmp_path) if isinstance(name, str) else name
    write_index(folder, "model.safetensors", dict.fromkeys(names, name))
    refused(folder, target, "is no index of shards|is damaged or lacks a part")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"99999999999.0.linear.weight": torch.zeros(D, D)}, "found 99999999999.0.linear.weight"),
        ({"9" * 5000 + ".0.linear.weight": torch.zeros(D, D)}, "no Medusa heads"),
        ({"0.999999999.linear.weight": torch.zeros(D, D)}, "found 0.999999999.linear.weight"),
        ({"0.999.weight": torch.zeros(VOCAB, D)}, "more than a Medusa drafter here may have"),
        ({f"{k}.0.linear.weight": torch.zeros(D, D) for k in range(3, 100)}, "is incomplete"),
        ({"7.0.linear.weight": torch.zeros(D, D)}, "lacks block 0 of head 3"),
        ({"token_map": torch.arange(VOCAB * 2)}, "token_map"),
        ({"token_map": torch.rand(40)}, "token_map"),
        ({"token_map": torch.zeros(4, 10, dtype=torch.long)}, "token_map"),
    ],
    ids=lambda value: str(next(iter(value)))[:30] if isinstance(value, dict) else "",
)
def test_names_and_ids_that_promise_too_much(target, tmp_path, change, message):
    save_file({**sequential_names(random_heads()), **change}, tmp_path / "medusa_lm_head.safetensors")
    refused(tmp_path, target, message)


@pytest.mark.parametrize(
    "extra",
    [
        torch.zeros(1).expand(2**20, 2**20),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, 2, device="meta"),
        "text",
        {"nested": torch.zeros(1)},
    ],
    ids=["expanded", "sparse", "meta", "text", "nested"],
)
def test_a_pickle_with_tensors_that_are_not_there(target, tmp_path, extra):
    torch.save({**sequential_names(random_heads()), "token_map": extra}, tmp_path / "medusa_lm_head.pt")
    refused(tmp_path, target, "no dictionary of tensors|never executed")


def test_a_missing_configuration_is_no_loss(target, tmp_path):
    """Published folders exist without the counts (Medusa's issue 76): the tensors say it all."""
    heads, hidden = random_heads(), torch.randn(6, D)
    write_pt(tmp_path, heads)
    (tmp_path / "config.json").unlink()
    check_forward(converted(tmp_path, target), published_forward(heads, hidden), hidden)


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"{}"])
def test_damaged_files_are_refused(target, tmp_path, name, content):
    write_config(tmp_path)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, target, name.replace(".", r"\."))


def test_a_missing_shard_is_refused(target, tmp_path):
    write_whole_model(tmp_path, random_heads())
    (tmp_path / "b.safetensors").unlink()
    refused(tmp_path, target, "damaged or lacks a part")


def test_a_pickle_of_something_else_is_refused(target, tmp_path):
    write_config(tmp_path)
    torch.save([torch.zeros(2)], tmp_path / "medusa_lm_head.pt")
    refused(tmp_path, target, "no dictionary of tensors")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_configuration_is_refused(target, tmp_path, content):
    write_pt(tmp_path, random_heads())
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, target, "config.json is no JSON")


def test_an_empty_folder_and_no_folder_are_refused(target, tmp_path):
    refused(tmp_path, target, "holds no published Medusa heads: expected one of medusa_lm_head.safetensors")
    refused(tmp_path / "none", target, "there is no folder")


def test_our_own_checkpoint_needs_no_converting(target, tmp_path):
    write_pt(tmp_path / "theirs", random_heads())
    save_drafter(converted(tmp_path / "theirs", target), tmp_path / "ours", target.fingerprint, card="", training={})
    refused(tmp_path / "ours", target, "already: use it with --drafter")
