"""Drafter folders of strangers: whatever stands in them, they load, or are refused by a sentence, and cost nothing."""

from __future__ import annotations

import json
import resource
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from amphista.drafter import checkpoint
from amphista.drafter.amphista import AmphistaConfig
from amphista.drafter.base import Calibration
from amphista.drafter.checkpoint import load_drafter, make_drafter, save_drafter
from amphista.drafter.medusa import MedusaConfig
from amphista.drafter.proposer import Proposer
from amphista.engine.params import SamplingParams
from amphista.engine.step import Engine
from amphista.errors import DrafterError
from amphista.tree.grow import parse_tree
from tests.decoding import decode
from tests.tiny import shaken

CONFIGS = {
    "amphista": AmphistaConfig(num_heads=2, draft_vocab=50, path_rank=4, intermediate_size=24),
    "medusa": MedusaConfig(num_heads=2, lm_head="own"),
}
CALIBRATION = Calibration(greedy=[1.0, 1.5], sampled=[1.25, 2.0], coverage=0.9, accuracy=[[0.5, 0.25], [0.5]])
TRAINED = {
    "data": {"rows": 3, "answer_tokens": 9},
    "progress": {"positions": 1, "step": 2, "seconds": 3.0},
    "recipe": {"data": {}, "card": {}},
}
NAN, INFINITY = float("nan"), float("inf")


def make_folder(path, target, kind="amphista"):
    drafter = make_drafter(kind, CONFIGS[kind], target.spec, target.shared)
    drafter.calibration = CALIBRATION
    save_drafter(shaken(drafter), path, target.fingerprint, card="# card\n", training=TRAINED)
    return path


@pytest.fixture
def folder(tmp_path, target):
    return make_folder(tmp_path / "theirs", target)


def edit(folder, place, value):
    """Set a value in config.json by its dotted place."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    *sections, key = place.split(".")
    at = values
    for section in sections:
        at = at[section]
    at[key] = value
    path.write_text(json.dumps(values))


def refused(folder, target, match=None):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DrafterError, match=match) as caught:
        load_drafter(folder, target.spec, target.shared, target.fingerprint)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kB"
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


HUGE = [2**31, 2**62, 2**63, 10**30, 10**7]
NO_NUMBERS = ["5", [5], {"a": 1}, True, 2.5, NAN, INFINITY, -1, 0]
SIZES = ["num_heads", "path_rank", "path_shortlist", "intermediate_size", "encoder_intermediate_size"]
SIZES += ["num_encoder_layers", "draft_vocab"]


@pytest.mark.parametrize("value", [*HUGE, *NO_NUMBERS], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_the_weights_do_not_have(folder, target, name, value):
    edit(folder, f"config.{name}", value)
    refused(folder, target)


@pytest.mark.parametrize("value", [*HUGE, *NO_NUMBERS], ids=str)
@pytest.mark.parametrize("name", ["num_heads", "num_layers"])
def test_sizes_of_medusa_heads(tmp_path, target, name, value):
    folder = make_folder(tmp_path / "theirs", target, "medusa")
    edit(folder, f"config.{name}", value)
    refused(folder, target)


@pytest.mark.parametrize("value", [2**31, -3, "1", 3, [0]], ids=str)
@pytest.mark.parametrize("name", ["stages", "stage_split"])
def test_stages(folder, target, name, value):
    edit(folder, f"config.{name}", value)
    refused(folder, target)


def test_a_drafter_is_built_without_storage_and_takes_the_tensors_of_the_file(folder, target, monkeypatch):
    built = []
    real = checkpoint.make_drafter

    def watched(*args):
        built.append(real(*args))
        assert all(tensor.is_meta for tensor in built[-1].state_dict().values())
        return built[-1]

    monkeypatch.setattr(checkpoint, "make_drafter", watched)
    loaded = load_drafter(folder, target.spec, target.shared, target.fingerprint)
    assert loaded is built[0] and not any(tensor.is_meta for tensor in loaded.state_dict().values())


WRONG_NUMBERS = ["1.0", None, [1.0], {"a": 1}, True, NAN, INFINITY, -INFINITY, 0, -1.0, 1e-300, 1e300]


@pytest.mark.parametrize("value", WRONG_NUMBERS, ids=str)
@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_temperatures_of_the_heads(folder, target, name, value):
    edit(folder, f"calibration.{name}", [1.0, value])
    refused(folder, target)


@pytest.mark.parametrize("value", [5.0, 1.0001, *WRONG_NUMBERS[:10]], ids=str)
def test_coverage(folder, target, value):
    edit(folder, "calibration.coverage", value)
    refused(folder, target)


@pytest.mark.parametrize(
    "value",
    [[["a"], [0.1]], [[NAN], [0.1]], [[-0.1], [0.1]], [[1.5], [0.1]], [[0.6, 0.6], [0.1]], [0.1, 0.1], "0.1"]
    + [[[0.1]], [[0.1]] * 3, {"0": [0.1]}, [[[0.1]], [0.1]], [None, [0.1]], 3],
    ids=str,
)
def test_accuracy(folder, target, value):
    edit(folder, "calibration.accuracy", value)
    refused(folder, target)


@pytest.mark.parametrize("value", [[1.0], [1.0] * 3, [], "11", {"0": 1.0}], ids=str)
def test_a_calibration_of_other_heads(folder, target, value):
    edit(folder, "calibration.greedy", value)
    refused(folder, target)


GARBAGE = [3, "x" * 100_000, [1] * 1000, [[[]]], {"a": {"b": [{}]}}, NAN]


@pytest.mark.parametrize("place", ["config", "target", "calibration", "training", "drafter", "format"])
@pytest.mark.parametrize(
    "value", [3, "x" * 100_000, [1] * 1000, [[[]]], {"a": {"b": [{}]}}, NAN], ids=lambda v: str(v)[:9]
)
def test_sections_that_are_something_else(folder, target, place, value):
    edit(folder, place, value)
    if place == "training" and isinstance(value, dict):
        assert load_drafter(folder, target.spec, target.shared, target.fingerprint).num_heads == 2
    else:
        refused(folder, target)


@pytest.mark.parametrize(
    "place", ["data", "progress", "before", "recipe", "recipe.data", "recipe.card", "data.rows", "progress.step"]
)
@pytest.mark.parametrize("value", ["x", [1]], ids=str)
def test_a_training_record_of_another_form(folder, target, place, value):
    """Cards and later trainings read it."""
    edit(folder, f"training.{place}", value)
    refused(folder, target, "another form than training writes")


TEXTS = ["[" * 100_000, '{"a":' * 100_000, '{"format": ' + "9" * 10_000 + "}", "\ufeff{}", "nul\0", "NaN"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:5])
def test_text_that_is_no_json(folder, target, text):
    (folder / "config.json").write_text(text)
    refused(folder, target, "damaged or not ours")


def test_a_configuration_without_end(folder, target):
    with (folder / "config.json").open("ab") as file:
        file.truncate(1 << 40)  # sparse
    refused(folder, target, "larger than")


def test_bytes_that_are_no_text(folder, target):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00{")
    refused(folder, target, "damaged or not ours")


def rewrite(folder, **changes):
    save_file({**load_file(folder / "model.safetensors"), **changes}, folder / "model.safetensors")


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_weights_that_are_no_numbers(folder, target, value):
    weight = load_file(folder / "model.safetensors")["heads.0.linear.weight"]
    weight[1, 2] = value
    rewrite(folder, **{"heads.0.linear.weight": weight})
    refused(folder, target, "heads.0.linear.weight")


@pytest.mark.parametrize(
    "changes",
    [
        {"heads.0.linear.weight": torch.zeros(32, 32, dtype=torch.int32)},
        {"heads.0.linear.weight": torch.zeros(32, 32, dtype=torch.int8)},
        {"heads.0.linear.weight": torch.zeros(1, 32)},
        {"heads.0.linear.bias": torch.zeros(())},
        {"draft_ids": torch.arange(50).float()},
        {"draft_ids": torch.arange(50)[:, None]},
        {"draft_ids": torch.arange(50) - 1},
        {"draft_ids": torch.zeros(50, dtype=torch.int64)},
        {"surplus": torch.zeros(1)},
        {"x" * 10_000: torch.zeros(1)},
    ],
    ids=lambda changes: next(iter(changes))[:20],
)
def test_tensors_of_another_form(folder, target, changes):
    rewrite(folder, **changes)
    refused(folder, target)


def test_a_header_that_promises_more_than_there_is(folder, target):
    for header in (
        {"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64]}},
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    ):
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
        refused(folder, target, "missing or damaged")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + bytes(64))
    refused(folder, target, "missing or damaged")


def test_links_to_what_is_no_file(folder, target, tmp_path):
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        for place in (tmp_path, tmp_path / "nowhere", "/dev/zero", folder / name):
            (folder / name).symlink_to(place)
            refused(folder, target)
            (folder / name).unlink()


def test_weights_at_the_edge_of_their_type_cost_no_answer(folder, target):
    """They overflow within the draft; the target decides all the same."""
    plain = Proposer()
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    expected = decode(Engine(target, plain, parse_tree(1)), [5, 6, 7], params).output_ids
    weights = load_file(folder / "model.safetensors")
    rewrite(folder, **{n: torch.full_like(w, 1e38) for n, w in weights.items() if w.is_floating_point()})
    drafter = load_drafter(folder, target.spec, target.shared, target.fingerprint)
    for tree in (4, "chain"):
        assert decode(Engine(target, drafter, parse_tree(tree)), [5, 6, 7], params).output_ids == expected


@pytest.mark.parametrize("name", [3, None, b"x", ["medusa"], object()], ids=lambda name: type(name).__name__)
def test_names_that_are_none(target, name):
    refused(name, target, "given by its name or folder")


@pytest.mark.parametrize("name", ["", "~nobody-of-this-name/x", "x" * 5000, "a\0b", "a" * 300 + "/b", "owner/na me"])
def test_names_that_no_folder_can_have(target, name):
    refused(name, target)
