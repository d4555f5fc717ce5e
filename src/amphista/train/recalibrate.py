"""Calibrate a drafter that is not in training: anew on other answers or for another draft vocabulary; or for the first
time, one that was converted.

    amphista dev calibrate runs/amphista/best --data answers.jsonl.gz --out drafters/amphista
    amphista convert medusa SOURCE --target T --out DIR --data answers.jsonl.gz
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amphista import provenance
from amphista.config import build
from amphista.drafter.card import CardConfig, write_card
from amphista.drafter.checkpoint import (
    Checkpoint,
    check_out,
    load_drafter,
    locate_checkpoint,
    make_drafter,
    save_drafter,
)
from amphista.drafter.published import Published
from amphista.drafter.scoring import ScoringDrafter
from amphista.errors import ConfigError
from amphista.target.loading import hub_name
from amphista.target.target import Target
from amphista.train.calibrate import calibrate
from amphista.train.dataset import HiddenStates, coverage, frequent_tokens, split_rows
from amphista.train.losses import LossConfig
from amphista.train.prompts import read_rows
from amphista.train.token_row import TokenRow
from amphista.tree.build import build_template, expected_tau

MAX_LEN = 2048


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """`all_rows`: use training rows, too, where the data are those of the training. `draft_vocab`: choose another one.

    `nodes`: size of the static tree that is shown.
    """

    all_rows: bool = False
    draft_vocab: int | None = None
    nodes: int = 16

    def __post_init__(self) -> None:
        if self.nodes < 2:
            raise ConfigError(f"--nodes is {self.nodes}: expected at least 2")


def recalibrate(target: Target, name: str, data: Sequence[Path], out: Path, config: CalibrateConfig) -> dict[str, Any]:
    """Calibrate a drafter and save it to `out`; returns what was measured.

    raises ConfigError, DataError or DrafterError for a folder, rows or a drafter that do not fit.
    """
    check_out(out)
    checkpoint = locate_checkpoint(name, target.fingerprint)
    rows = _read(data, target)
    seen, held_out = _split(checkpoint, rows, data, config.all_rows)
    drafter = load_drafter(str(checkpoint.folder), target.spec, target.shared, target.fingerprint)
    drafter = drafter.float()
    if config.draft_vocab is not None:
        drafter = _with_draft_vocab(drafter, target, seen or rows, config.draft_vocab)
    hidden = HiddenStates(target, held_out, None)
    drafter.calibration, measured = calibrate(drafter, held_out, hidden, LossConfig())
    accuracy = drafter.calibration.accuracy
    template = build_template(accuracy, config.nodes)
    record = {
        "files": [path.name for path in data],
        "rows": len(held_out),
        "held_out": bool(seen) or not _is_training_data(checkpoint, data),
        "coverage": coverage(held_out, drafter.draft_ids),
        "draft_vocab": drafter.draft_vocab,
        "measured": measured,
        "static_tree": {"nodes": template.num_nodes, "expected_tau": expected_tau(accuracy, template)},
        "provenance": provenance.record(),
    }
    training = {**checkpoint.training, "validation": measured, "calibration": record}
    training["data"] = {
        "files": record["files"],
        **checkpoint.training.get("data", {}),
        **_held_out_record(held_out, drafter),
    }
    wording = build(CardConfig, checkpoint.training.get("recipe", {}).get("card") or {})
    card = write_card(drafter, hub_name(target.name), training, wording)
    save_drafter(drafter, out, target.fingerprint, card=card, training=training, dtype=target.dtype)
    return record


def save_converted(
    published: Published, target: Target, out: Path, data: Sequence[Path], card: CardConfig
) -> dict[str, Any]:
    """Save a converted drafter as a checkpoint, calibrated where there are answers; returns its training record.

    data: files as for training, all of them held out, since nothing is trained. Without them its trees take its
    probabilities as they are. card: its licence defaults to the published one. Raises ConfigError where `check_out`
    does.
    """
    check_out(out)
    drafter = published.drafter.to(target.device)
    names = ("source", "file", "base_model", "license")
    training: dict[str, Any] = {
        "converted": {name: getattr(published, name) for name in names},
        "provenance": provenance.record(),
    }
    if data:
        rows = _read(data, target)
        hidden = HiddenStates(target, rows, None)
        drafter.calibration, training["validation"] = calibrate(drafter, rows, hidden, LossConfig())
        training["data"] = {"files": [path.name for path in data], **_held_out_record(rows, drafter)}
    card = replace(card, license=card.license or published.license)
    text = write_card(drafter, hub_name(target.name), training, card, published.dtype)
    save_drafter(drafter, out, target.fingerprint, card=text, training=training, dtype=published.dtype)
    return training


def _read(data: Sequence[Path], target: Target) -> list[TokenRow]:
    limit = min(MAX_LEN, target.spec.max_positions)
    return read_rows(data, target.text, target.eos_ids, vocab_size=target.spec.vocab_size, max_len=limit)


def _held_out_record(rows: Sequence[TokenRow], drafter: ScoringDrafter) -> dict[str, Any]:
    return {
        "validation_rows": len(rows),
        "validation_answer_tokens": sum(row.num_answer_tokens for row in rows),
        "validation_coverage": coverage(rows, drafter.draft_ids),
    }


def _split(
    checkpoint: Checkpoint, rows: list[TokenRow], data: Sequence[Path], all_rows: bool
) -> tuple[list[TokenRow], list[TokenRow]]:
    """(rows of the training, rows to calibrate on). Data under the training's file names are split as it split them."""
    if all_rows or not _is_training_data(checkpoint, data):
        return [], rows
    recipe = checkpoint.training["recipe"]["data"]
    return split_rows(rows, recipe["validation_share"], recipe["seed"])


def _is_training_data(checkpoint: Checkpoint, data: Sequence[Path]) -> bool:
    trained_on = checkpoint.training.get("recipe", {}).get("data", {}).get("files", [])
    return bool({path.name for path in data} & set(trained_on))


def _with_draft_vocab(drafter: ScoringDrafter, target: Target, rows: Sequence[TokenRow], size: int) -> ScoringDrafter:
    """The same heads over the `size` most frequent tokens: with the shared LM head no weight depends on them."""
    if drafter.config.lm_head != "shared":
        raise ConfigError("--draft-vocab: this drafter's own LM heads are made for its draft vocabulary")
    changed = make_drafter(drafter.name, replace(drafter.config, draft_vocab=size), target.spec, target.shared)
    changed.set_draft_ids(frequent_tokens(rows, size, sorted(target.eos_ids)))
    weights = {name: tensor for name, tensor in drafter.state_dict().items() if name != "draft_ids"}
    changed.load_state_dict({**weights, "draft_ids": changed.draft_ids}, strict=True)
    return changed.to(target.device).eval().requires_grad_(False)
