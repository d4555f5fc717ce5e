"""Publish a drafter's folder on the Hugging Face hub: check it whole, then upload exactly its three files.

    amphista dev push runs/amphista/best owner/name --dry-run

A folder is refused unless it is a checkpoint that loads and its card tells what a reader of the hub needs: base_model,
license, data, and a measured tau.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from amphista.drafter.card import read_front_matter
from amphista.drafter.checkpoint import CHECKPOINT_FILES, read_checkpoint, recover_drafter, weights_file
from amphista.drafter.hub import check_repo_id, upload
from amphista.errors import DrafterError


def push(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Check and upload a checkpoint folder; returns the repository's address. Raises DrafterError."""
    check_repo_id(repo_id)
    return upload(publishable_files(folder), repo_id, private=private)


def publishable_files(folder: Path) -> list[Path]:
    """The files that `push` uploads; raises DrafterError naming everything that is missing."""
    if not folder.is_dir():
        raise DrafterError(f"there is no folder {folder}: give a drafter's folder, such as OUT/best of a training run")
    recover_drafter(folder)
    weights = weights_file(read_checkpoint(folder))
    try:
        with safe_open(weights, framework="pt") as tensors:  # reads and checks the header, no weight
            tensors.keys()
    except (OSError, SafetensorError) as error:
        raise DrafterError(f"{weights} is missing or damaged ({error}): train or convert the drafter again") from error
    lacking = missing_from_card(read_front_matter(folder / "README.md"))
    if lacking:
        raise DrafterError(f"the front matter of {folder / 'README.md'} lacks {'; '.join(lacking)}")
    return [folder / name for name in CHECKPOINT_FILES]


def missing_from_card(front_matter: dict[str, Any]) -> list[str]:
    """What a card lacks, each with what to do about it; empty where nothing does."""
    lacking = []
    base_model = front_matter.get("base_model")
    bases = base_model if isinstance(base_model, list) else [base_model]
    if not all(isinstance(name, str) and name.count("/") == 1 for name in bases):
        lacking.append(f"base_model as a hub id (it is {base_model!r}: write owner/name, or set card.base_model)")
    if not front_matter.get("license"):
        lacking.append("license (write one such as apache-2.0, or set card.license, or --license of convert)")
    if not front_matter.get("datasets") and not front_matter.get("training_data"):
        lacking.append("data (name hub data sets under `datasets`, or describe others under `training_data`)")
    if not _has_tau(front_matter.get("model-index")):
        lacking.append("a measured tau in model-index (`amphista train` measures it, `amphista convert --data` too)")
    return lacking


def _has_tau(index: Any) -> bool:
    try:
        metrics = [m for model in index for result in model["results"] for m in result["metrics"]]
        return any(metric["type"] == "tau" and float(metric["value"]) >= 1 for metric in metrics)
    except (TypeError, KeyError, ValueError):
        return False
