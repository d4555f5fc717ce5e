from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amphista.drafter import checkpoint
from amphista.drafter.amphista import AmphistaConfig
from amphista.drafter.base import Calibration
from amphista.drafter.checkpoint import (
    CHECKPOINT_FILES,
    load_drafter,
    load_proposer,
    make_drafter,
    read_checkpoint,
    recover_drafter,
    save_drafter,
)
from amphista.drafter.medusa import MedusaConfig
from amphista.errors import ConfigError, DrafterError
from tests.tiny import shaken, tiny_target

CALIBRATION = Calibration(greedy=[1.0, 1.5], sampled=[1.25, 2.0], coverage=0.9, accuracy=[[0.5, 0.25], [0.5, 0.0]])
CONFIGS = {
    "amphista": AmphistaConfig(num_heads=2, draft_vocab=50, stage_split=0, intermediate_size=24),
    "medusa": MedusaConfig(num_heads=2, lm_head="own", draft_vocab=50, num_layers=2),
}


def drafter_of(target, kind="amphista"):
    drafter = make_drafter(kind, CONFIGS[kind], target.spec, target.shared)
    drafter.set_draft_ids(torch.arange(1, 300, 6))
    drafter.calibration = CALIBRATION
    return shaken(drafter)


def save(drafter, folder, target, **settings):
    save_drafter(drafter, folder, target.fingerprint, card="# card\n", training={"step": 3}, **settings)


def load(folder, target, **settings):
    return load_drafter(str(folder), target.spec, target.shared, target.fingerprint, **settings)


@pytest.fixture
def folder(tmp_path, target):
    save(drafter_of(target), tmp_path / "here", target)
    return tmp_path / "here"


def edit(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# -- round trip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_saved_comes_back(tmp_path, target, kind):
    drafter = drafter_of(target, kind)
    save(drafter, tmp_path / "deep" / "here", target)
    loaded = load(tmp_path / "deep" / "here", target)
    assert type(loaded) is type(drafter) and loaded.config == drafter.config
    assert loaded.calibration == CALIBRATION
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    hidden, ids = torch.randn(4, 32), torch.tensor([1, 2, 3, 4])
    drafts = []
    for one in (drafter, loaded):
        state = one.start()
        one.commit(state, hidden, ids)
        drafts.append(one.draft(state, 5))
    assert drafts[0] == drafts[1]


def test_a_checkpoint_is_three_readable_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert folder.stat().st_mode & 0o777 == 0o755
    found = read_checkpoint(folder)
    assert found.training == {"step": 3} and found.kind == "amphista" and found.config == CONFIGS["amphista"]


def test_the_targets_own_weights_are_not_stored(folder, target):
    assert target.shared.head_weight.shape not in {
        tensor.shape for tensor in load_file(folder / "model.safetensors").values()
    }


def test_rounding_on_disk_leaves_the_drafter_as_it_is(tmp_path, target):
    drafter = drafter_of(target)
    before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    save(drafter, tmp_path / "here", target, dtype=torch.bfloat16)
    stored, loaded = load_file(tmp_path / "here" / "model.safetensors"), load(tmp_path / "here", target).state_dict()
    for name, tensor in before.items():
        assert torch.equal(drafter.state_dict()[name], tensor)
        if tensor.is_floating_point():
            assert stored[name].dtype == torch.bfloat16 and loaded[name].dtype == torch.float32
            assert torch.equal(loaded[name], tensor.to(torch.bfloat16).float())
        else:
            assert torch.equal(stored[name], tensor) and torch.equal(loaded[name], tensor)


def test_a_drafter_takes_its_targets_dtype(folder):
    target = tiny_target(dtype=torch.bfloat16)
    loaded = load(folder, target, allow_other_target=True)
    assert all(p.dtype == torch.bfloat16 for p in loaded.parameters()) and loaded.draft_ids.dtype == torch.int64


# -- damage -----------------------------------------------------------------------------------------------------------


def refused(folder, target, message):
    with pytest.raises(DrafterError, match=message):
        load(folder, target)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights_are_refused(folder, target, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, target, "missing or damaged")


def test_missing_weights_are_refused(folder, target):
    (folder / "model.safetensors").unlink()
    refused(folder, target, "missing or damaged")


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused(folder, target, change):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["surplus.weight"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, target, "does not fit its config.json.*" + ("surplus" if change == "extra" else name))


@pytest.mark.parametrize("key", ["drafter", "config", "target"])
def test_a_missing_key_is_refused(folder, target, key):
    edit(folder, lambda values: values.pop(key))
    refused(folder, target, f"config.json is damaged or not ours.*{key}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=2), "has format 2; this version reads format 1"),
        (lambda v: v.pop("format"), "has format None"),
        (lambda v: v.update(drafter="kingfisher"), "names the drafter 'kingfisher'"),
        (lambda v: v.update(drafter=["amphista"]), "damaged or not ours"),
        (lambda v: v["config"].update(num_head=2), "did you mean 'num_heads'"),
        (lambda v: v["config"].update(num_heads=0), "num_heads is 0"),
        (lambda v: v.update(config=[1]), "damaged or not ours"),
        (lambda v: v["target"].pop("lm_head_sha256"), "lm_head_sha256"),
        (lambda v: v["calibration"].update(greedy="1"), "greedy is '1'"),
    ],
)
def test_a_damaged_config_is_refused_by_name(folder, target, change, message):
    edit(folder, change)
    refused(folder, target, message)


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_config_that_is_no_object_is_refused(folder, target, content):
    (folder / "config.json").write_text(content)
    refused(folder, target, "config.json is damaged or not ours")


# -- the right target -------------------------------------------------------------------------------------------------


def test_another_targets_dimensions_are_refused_always(folder):
    other = tiny_target("qwen2", hidden_size=16)
    for allowed in (False, True):
        with pytest.raises(DrafterError, match=r"trained for another target.*hidden_size"):
            load(folder, other, allow_other_target=allowed)


def test_another_vocabulary_is_refused_always(folder, text_target):
    for allowed in (False, True):
        with pytest.raises(DrafterError, match="tokenizer_sha256 differ"):
            load(folder, text_target, allow_other_target=allowed)


def test_other_weights_of_the_same_shape_are_refused_unless_allowed(folder):
    other = tiny_target(seed=1)
    with pytest.raises(DrafterError, match="--allow-other-target"):
        load(folder, other)
    assert load(folder, other, allow_other_target=True).name == "amphista"


# -- saving over an old one -------------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_saving_again_replaces_the_old_one(folder, target):
    other = shaken(drafter_of(target), seed=9)
    save(other, folder, target)
    assert torch.equal(load(folder, target).heads[0].linear.weight, other.heads[0].linear.weight)
    assert set(contents(folder)) == set(CHECKPOINT_FILES)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_saving_touches_no_other_file(folder, target):
    """A clone of the hub keeps its history, and whatever else lies there."""
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / "notes.txt").write_text("mine")
    inode = folder.stat().st_ino
    save(shaken(drafter_of(target), seed=9), folder, target)
    assert (folder / ".git" / "HEAD").read_text() == "ref: refs/heads/main\n" and (folder / ".git" / "objects").is_dir()
    assert (folder / "notes.txt").read_text() == "mine" and folder.stat().st_ino == inode


def test_saving_does_not_write_through_links(folder, target, tmp_path):
    """Folders of the hub's cache hold links to files that other folders share."""
    elsewhere = tmp_path / "shared"
    elsewhere.mkdir()
    for name in CHECKPOINT_FILES:
        (folder / name).rename(elsewhere / name)
        (folder / name).symlink_to(elsewhere / name)
    before = contents(elsewhere)
    save(shaken(drafter_of(target), seed=9), folder, target)
    assert contents(elsewhere) == before and load(folder, target).name == "amphista"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "notes.txt"])
def test_saving_over_files_of_somebody_else_is_refused(target, tmp_path, name):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / name).write_text('{"model_type": "llama"}')
    before = contents(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="is there already and is no drafter of ours"):
        save(drafter_of(target), tmp_path / "theirs", target)
    assert contents(tmp_path / "theirs") == before


def test_a_folder_of_hidden_files_is_free(target, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    save(drafter_of(target), tmp_path / "here", target)
    assert load(tmp_path / "here", target).name == "amphista" and (tmp_path / "here" / ".gitattributes").is_file()


def test_saving_where_a_file_is_or_nothing_can_be_written(target, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is no folder"):
        save(drafter_of(target), tmp_path / "file", target)
    with pytest.raises(ConfigError, match="cannot write the drafter to"):
        save(drafter_of(target), tmp_path / "file" / "below", target)


class Killed(BaseException):
    """Stands for a kill: nothing that follows it is run."""


def points_of_a_save(monkeypatch, run):
    """Run a save again and again, killed before its first, second, ... change of the folder, until one goes through."""
    real_replace, real_write, real_unlink = Path.replace, checkpoint.write_weights, Path.unlink
    for deadline in range(20):
        steps = iter(range(deadline))

        def step(real, steps=steps):
            def stepped(*args, **kwargs):
                try:
                    next(steps)
                except StopIteration:
                    raise Killed from None
                return real(*args, **kwargs)

            return stepped

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", step(real_replace))
            patch.setattr(Path, "unlink", step(real_unlink))
            patch.setattr(checkpoint, "write_weights", step(real_write))
            try:
                run()
                return
            except Killed:
                pass
        yield deadline
    raise AssertionError("the save never went through")


def test_a_save_killed_anywhere_leaves_the_old_drafter_or_the_new_one(folder, target, tmp_path, monkeypatch):
    old, new = load(folder, target), shaken(drafter_of(target), seed=9)
    new.calibration = dataclasses.replace(CALIBRATION, coverage=0.5)
    whole = {0.9: old.state_dict(), 0.5: new.state_dict()}
    work, seen = tmp_path / "work", []

    def run():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        save(new, work, target)

    for _ in points_of_a_save(monkeypatch, run):
        found = load(work, target)  # as it lies there
        recover_drafter(work)
        again = load(work, target)
        seen.append(found.calibration.coverage)
        for loaded in (found, again):
            for name, tensor in whole[found.calibration.coverage].items():
                assert torch.equal(loaded.state_dict()[name], tensor), (seen, name)
        assert set(contents(work)) == set(CHECKPOINT_FILES)
    assert seen == sorted(seen, reverse=True) and set(seen) == {0.9, 0.5}, "killed on both sides of the switch"


@pytest.mark.parametrize("failing", ["write_weights", "asdict", "_replace"])
def test_a_failed_save_leaves_the_old_one_whole(folder, target, monkeypatch, failing):
    before = contents(folder)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, failing, fail)
    with pytest.raises(KeyboardInterrupt):
        save(shaken(drafter_of(target), seed=9), folder, target)
    with pytest.raises(KeyboardInterrupt):
        save(drafter_of(target), folder.parent / "new", target)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_weights_of_another_save_are_refused(folder, target):
    """A copy that was broken off: the configuration of one, the weights of another."""
    save(shaken(drafter_of(target), seed=9), folder.parent / "other", target)
    shutil.copy(folder.parent / "other" / "model.safetensors", folder)
    refused(folder, target, "holds other weights than its config.json was saved with")


# -- where checkpoints are found --------------------------------------------------------------------------------------


def test_none_is_plain_decoding(target):
    proposer = load_proposer("none", target.spec, target.shared, target.fingerprint)
    assert proposer.proposes_nothing and proposer.name == "none"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "nowhere", "a/b/c"])
def test_unknown_names_are_refused_without_asking_the_hub(target, name, monkeypatch):
    monkeypatch.setattr(checkpoint, "fetch", None)
    with pytest.raises(DrafterError, match="there is no folder" if name[0] in "./~" else "unknown drafter") as refused:
        load(name, target)
    assert "eagle" not in str(refused.value), "of what is not shipped"


def test_a_folder_without_a_checkpoint_is_refused(target, tmp_path):
    refused(tmp_path, target, "holds no config.json")


def test_the_hub_is_asked_for_owner_and_name(target, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint, "fetch", lambda name, files, hub: asked.append((name, files)) or folder)
    assert load("owner/name", target).name == "amphista"
    assert asked == [("owner/name", ("config.json",)), ("owner/name", CHECKPOINT_FILES)]


def test_a_hub_that_cannot_be_reached_is_one_sentence(target):
    with pytest.raises(DrafterError, match="cannot fetch drafter 'owner/name' from the hub") as caught:
        load("owner/name", target)
    assert "\n" not in str(caught.value)


def test_shipped_drafters_are_chosen_by_kind_and_target(target, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "shipped_folder", lambda: tmp_path)
    with pytest.raises(DrafterError, match="no medusa drafter is shipped"):
        load("medusa", target)
    save(drafter_of(target, "medusa"), tmp_path / "tiny-medusa", target)
    other = tiny_target(seed=1)
    save(drafter_of(other), tmp_path / "other-amphista", other)
    assert load("medusa", target).name == "medusa"
    with pytest.raises(DrafterError, match="--allow-other-target"):  # same shape, other weights
        load("amphista", target)
    assert load("amphista", target, allow_other_target=True).name == "amphista"
    assert checkpoint.shipped_for("amphista", other.fingerprint).folder == tmp_path / "other-amphista"


def test_no_shipped_folder_is_no_error(target, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "shipped_folder", lambda: tmp_path / "none")
    assert checkpoint.shipped_checkpoints() == {}


def test_fresh_drafters_are_made_by_name(target):
    with pytest.raises(ConfigError, match="unknown drafter 'kingfisher'"):
        make_drafter("kingfisher", CONFIGS["medusa"], target.spec, target.shared)
    assert dataclasses.asdict(make_drafter("medusa", CONFIGS["medusa"], target.spec, target.shared).config)


# -- contents that a strict load cannot see ---------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [torch.arange(251, 301), torch.arange(50).flip(0), torch.zeros(50, dtype=torch.long)])
def test_a_draft_vocabulary_that_is_no_set_of_token_ids_is_refused(folder, target, ids):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "draft_ids": ids}, folder / "model.safetensors")
    with pytest.raises(DrafterError, match="draft vocabulary"):
        load(folder, target)


def test_a_calibration_for_another_number_of_heads_is_refused(folder, target):
    edit(folder, lambda values: values["calibration"].update(greedy=[1.0] * 3, sampled=[1.0] * 3, accuracy=[]))
    with pytest.raises(DrafterError, match="calibrated for another number of heads"):
        load(folder, target)
