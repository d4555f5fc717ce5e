"""Take a published drafter in: measure it on answers where there are some, then write it as a checkpoint of ours.

    amphista convert medusa SOURCE --target T --out DIR --data answers.jsonl.gz

Without answers the drafter works, but uncalibrated: its trees trust its probabilities as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from amphista import provenance
from amphista.drafter.card import CardConfig, write_card
from amphista.drafter.checkpoint import check_out, save_drafter
from amphista.drafter.convert import Published
from amphista.target.loading import hub_name
from amphista.target.target import Target
from amphista.train.calibrate import calibrate
from amphista.train.dataset import HiddenStates, coverage
from amphista.train.losses import LossConfig
from amphista.train.prompts import read_rows

MAX_LEN = 2048


def adopt(published: Published, target: Target, out: Path, data: Sequence[Path], card: CardConfig) -> dict[str, Any]:
    """Measure, card, save; returns what config.json then holds under `training`.

    data: files as for training, all of them held out, since nothing is trained. card: its licence defaults to the
    published one. Raises ConfigError where `check_out` does.
    """
    check_out(out)
    drafter = published.drafter.to(target.device)
    training: dict[str, Any] = {
        "converted": {
            "source": published.source,
            "file": published.file,
            "base_model": published.base_model,
            "license": published.license,
        },
        "provenance": provenance.record(),
    }
    if data:
        limit = min(MAX_LEN, target.spec.max_positions)
        rows = read_rows(data, target.text, target.eos_ids, vocab_size=target.spec.vocab_size, max_len=limit)
        drafter.calibration, training["validation"] = calibrate(
            drafter, rows, HiddenStates(target, rows, None), LossConfig()
        )
        training["data"] = {
            "files": [path.name for path in data],
            "validation_rows": len(rows),
            "validation_answer_tokens": sum(row.num_answer_tokens for row in rows),
            "validation_coverage": coverage(rows, drafter.draft_ids),
        }
    card = replace(card, license=card.license or published.license)
    text = write_card(drafter, hub_name(target.name), training, card, published.dtype)
    save_drafter(drafter, out, target.fingerprint, card=text, training=training, dtype=published.dtype)
    return training
