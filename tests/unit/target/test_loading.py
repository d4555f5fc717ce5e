from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from amphista.errors import DrafterError, NativeError, TargetError
from amphista.llm import load
from amphista.target import DEFAULT_TARGET
from amphista.target.loading import describe_target, hub_name, load_target
from tests.tiny import byte_tokenizer, tiny_model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (DEFAULT_TARGET, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("lmsys/vicuna-7b-v1.3", "lmsys/vicuna-7b-v1.3"),
        ("./models/mine", "mine"),
        ("~/models/mine", "mine"),
        ("/somewhere/private/mine.gguf", "mine.gguf"),
    ],
)
def test_a_target_by_any_name_has_its_hub_id_or_none_of_anyones_folders(name, expected):
    assert hub_name(name) == expected


def test_a_folder_that_reads_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("owner/name") == "name" and hub_name("owner/other") == "owner/other"


def without_compiler():
    raise NativeError("no compiler")


def test_int8_is_refused_where_it_cannot_be(tmp_path, monkeypatch):
    tiny_model("gpt2").save_pretrained(tmp_path)
    for form in ("fast", "native"):
        with pytest.raises(TargetError, match="need the C step: leave out"):
            load_target(str(tmp_path), dtype="int8", **{form: False})
    monkeypatch.setattr("amphista.target.loading.load", without_compiler)
    with pytest.raises(TargetError, match="need the C step: no compiler"):
        load_target(str(tmp_path), dtype="int8")


# -- the hub ----------------------------------------------------------------------------------------------------------


def in_hub_cache(cache_dir, revision, **changes):
    """A model as the hub's client keeps it: owner/name at a branch or tag."""
    root = cache_dir / "models--owner--name"
    snapshot = root / "snapshots" / f"{revision:0<40}"
    tiny_model("llama", **changes).save_pretrained(snapshot)
    byte_tokenizer().save_pretrained(snapshot)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(snapshot.name)


def test_revision_cache_and_staying_offline_reach_the_hubs_client(tmp_path):
    for revision, positions in (("main", 512), ("v2", 256)):
        in_hub_cache(tmp_path, revision, max_position_embeddings=positions)
    where = {"cache_dir": str(tmp_path), "local_files_only": True}
    assert load_target("owner/name", **where).spec.max_positions == 512
    target = load_target("owner/name", revision="v2", **where)
    assert target.spec.max_positions == 256
    assert target.stock().spec.max_positions == 256, "loaded again from the same revision"
    assert describe_target("owner/name", revision="v2", **where)["max_positions"] == 256
    with pytest.raises(TargetError, match="owner/name"):
        load_target("owner/name", revision="v3", **where)


@pytest.mark.parametrize("call", [load_target, describe_target])
def test_code_of_a_repository_is_never_run_nor_asked_about(tmp_path, monkeypatch, call):
    ran = tmp_path / "ran"
    (tmp_path / "configuration_mine.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked on standard input"))
    with pytest.raises(TargetError, match="code that its repository brings along, and amphista runs none"):
        call(str(tmp_path))
    assert not ran.exists()


@pytest.mark.parametrize("damaged", ["tokenizer.json", "model.safetensors", "config.json"])
def test_what_cannot_be_read_is_named(tmp_path, damaged):
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / damaged).write_text("{")
    part = {"tokenizer.json": "tokenizer", "model.safetensors": "model", "config.json": "config"}[damaged]
    with pytest.raises(TargetError, match=f"cannot load the {part} of target"):
        load_target(str(tmp_path))


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"tie_word_embeddings": True}, {}])
def test_tensors_that_the_files_lack_are_never_made_up(tmp_path, changes):
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    if "num_hidden_layers" not in changes:
        weights = load_file(tmp_path / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    if "tie_word_embeddings" in changes:
        assert load_target(str(tmp_path)).path in ("fast", "native"), "a tied head is not lacking"
        return
    with pytest.raises(TargetError, match=r"lack .* tensors, (model\.layers\.2|lm_head)"):
        load_target(str(tmp_path))


def test_end_tokens_that_the_model_does_not_have_are_none(tmp_path):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [257, 9999]
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    llm = load(tmp_path, "none")
    assert llm.target.eos_ids == {257}
    assert len(llm.generate("hi", min_tokens=3, max_tokens=3).token_ids) == 3


@pytest.mark.parametrize("device", ["mps", "xla", "nonsense"])
def test_a_device_that_is_not_here_is_refused_by_a_sentence(device):
    with pytest.raises(TargetError, match=f"device '{device}'"):
        load_target(device=device)


@pytest.mark.parametrize("name", ["~no-such-user/x", "~no-such-user/x.gguf", "x" * 5000, "", None, 5, b"x"])
def test_what_is_no_target_or_drafter_is_refused_by_a_sentence(name):
    with pytest.raises(TargetError, match=r"unknown target|is no name|no file|no folder"):
        load(name, "none")
    if name is not None:
        with pytest.raises(DrafterError, match=r"unknown drafter|is no name|no folder"):
            load(drafter=name)


def test_an_unknown_type_is_refused_before_a_file_is_converted(monkeypatch):
    monkeypatch.setattr("amphista.target.loading.locate", None)
    with pytest.raises(TargetError, match="unknown dtype 'fp16x'"):
        load_target(dtype="fp16x")


def test_a_type_may_be_torchs_own(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load(tmp_path, "none", dtype=torch.bfloat16).target.dtype is torch.bfloat16
