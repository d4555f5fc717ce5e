"""Cards are read back with the hub's own client, as the hub would."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard, metadata_load

from amphista.drafter.card import CardConfig, read_front_matter, write_card
from amphista.drafter.checkpoint import shipped_folder
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.errors import DrafterError

PART = {"positions": 10, "top": [[0.5, 0.6], [0.3, 0.4]]}
TRAINED = {
    "data": {
        "files": ["answers: part 1.jsonl.gz"],
        "rows": 100,
        "answer_tokens": 4000,
        "validation_rows": 5,
        "validation_answer_tokens": 200,
        "validation_coverage": 0.94,
    },
    "progress": {"positions": 12000, "step": 75, "seconds": 120.0},
    "validation": {
        "greedy": {"tau": {4: 1.8484358, 16: 2.2}, **PART},
        "sampled": {"tau": {4: 1.6, 16: 2.0}, **PART},
    },
}
CONVERTED = {"converted": {"source": "owner/theirs", "file": "medusa_lm_head.pt", "base_model": "owner/target"}}
FULL = CardConfig(license="apache-2.0", datasets=("owner/answers",))


@pytest.fixture
def drafter(target):
    return Medusa(MedusaConfig(num_heads=2), target.spec, target.shared)


def test_front_matter_is_what_the_hub_reads(drafter, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(write_card(drafter, "owner/Some-Target", TRAINED, FULL))
    card = ModelCard.load(path)
    data = card.data
    assert data.base_model == "owner/Some-Target" and data.base_model_relation == "adapter"
    assert data.license == "apache-2.0" and data.library_name == "amphista" and data.pipeline_tag == "text-generation"
    assert data.tags == ["speculative-decoding", "drafter", "medusa", "arxiv:2401.10774"]
    assert data.datasets == ["owner/answers"]
    assert data.training_data == {"files": ["answers: part 1.jsonl.gz"], "rows": 100, "answer_tokens": 4000}
    assert data.model_name == "Some-Target-medusa"
    found = {(r.dataset_config, r.metric_name.split()[-2]): r.metric_value for r in data.eval_results}
    assert found == {("greedy", "4"): 1.848, ("greedy", "16"): 2.2, ("sampled", "4"): 1.6, ("sampled", "16"): 2.0}
    assert {r.metric_type for r in data.eval_results} == {"tau"}
    assert {r.task_type for r in data.eval_results} == {"text-generation"}
    assert {r.dataset_type for r in data.eval_results} == {"owner/answers"}
    assert card.text.lstrip().startswith("# medusa drafter for owner/Some-Target")


def test_the_text_says_what_was_measured(drafter):
    card = write_card(drafter, "owner/target", TRAINED, FULL)
    assert "| greedy | 10 | 1.85 | 2.20 | 0.500 0.300 |" in card
    assert "75 steps (2 minutes)" in card
    short = {**TRAINED, "progress": {**TRAINED["progress"], "seconds": 50.0}}
    assert "75 steps (1 minute)" in write_card(drafter, "owner/target", short, FULL)
    assert "100 training rows, 4000 answer tokens" in card and "This is very little data" in card
    assert "94.0% of held-out answer tokens" in card


def test_a_card_without_anyones_wishes_says_no_more_than_is_known(drafter, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(write_card(drafter, "my-folder", TRAINED))
    found = metadata_load(path)
    assert "license" not in found and "datasets" not in found
    assert found["base_model"] == "my-folder"


def test_the_base_model_of_the_settings_wins(drafter, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(write_card(drafter, "my-folder", TRAINED, CardConfig(base_model="owner/real", license="mit")))
    assert metadata_load(path)["base_model"] == "owner/real"


def test_a_converted_drafter_names_its_origin(drafter, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(write_card(drafter, "owner/target", CONVERTED, CardConfig(license="mit")))
    found = metadata_load(path)
    assert found["training_data"] == {"published_by": "owner/theirs"} and "model-index" not in found
    text = path.read_text()
    assert "Converted from owner/theirs, which names owner/target as its target" in text
    assert "Not calibrated and not measured" in text


def test_a_measured_conversion_says_both(drafter, tmp_path):
    path = tmp_path / "README.md"
    both = {**TRAINED, **CONVERTED}
    path.write_text(write_card(drafter, "owner/target", both, CardConfig(license="mit")))
    assert metadata_load(path)["model-index"]
    text = path.read_text()
    assert "| greedy | 10 |" in text and "Not calibrated" not in text and "chose the best checkpoint" not in text


@pytest.mark.parametrize("content", ["---\na: [\n---\n", "---\n- a\n---\n"])
def test_front_matter_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "README.md").write_text(content)
    with pytest.raises(DrafterError, match=r"front matter of .*README\.md cannot be read"):
        read_front_matter(tmp_path / "README.md")


def test_a_missing_card_is_refused_and_one_without_front_matter_is_empty(tmp_path):
    with pytest.raises(DrafterError, match=r"holds no README\.md"):
        read_front_matter(tmp_path / "README.md")
    (tmp_path / "README.md").write_text("# A card\n")
    assert read_front_matter(tmp_path / "README.md") == {}


def test_the_cards_of_the_shipped_drafters_are_what_the_hub_reads():
    folders = [folder for folder in sorted(shipped_folder().iterdir()) if folder.is_dir()]
    assert len(folders) >= 2
    for folder in folders:
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and card.data.license == "apache-2.0"
