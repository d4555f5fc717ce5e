from __future__ import annotations

import pytest

from amphista.errors import TargetError
from amphista.target import DEFAULT_TARGET
from amphista.target.loading import hub_name, load_target
from tests.tiny import tiny_model


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


def test_int8_is_refused_where_it_cannot_be(tmp_path, monkeypatch):
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="need the fast path"):
        load_target(str(tmp_path), dtype="int8", fast=False)
    monkeypatch.setattr("amphista.target.loading.can_quantise", lambda weight: False)
    with pytest.raises(TargetError, match="8-bit dot products"):
        load_target(str(tmp_path), dtype="int8")
