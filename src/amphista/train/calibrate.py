"""Calibration on held-out answers: what the trees need to know about the heads.

One temperature per head makes its probabilities honest: the value that minimises the negative log-likelihood of the
text tokens inside the draft vocabulary (temperature scaling, arXiv 1706.04599), separately on greedy and on sampled
answers. Of a drafter with a path correction both are taken as it decodes, given the text's token at the depth above,
for trees multiply along paths. Accuracies by (depth, rank) build the static tree; coverage discounts what the draft
vocabulary cannot say.

Shapes: K heads, R ranks, M rows, N draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from amphista.drafter.base import HEAD_TEMPERATURES, Calibration
from amphista.drafter.scoring import ScoringDrafter
from amphista.train.dataset import HiddenStates, batches_of, check_measurable, coverage
from amphista.train.head_loss import draft_labels
from amphista.train.losses import LossConfig
from amphista.train.token_row import TokenRow
from amphista.train.validation import Validation, exact_logits_below, validate

GRID = torch.arange(0.6, 3.01, 0.05)
MAX_POSITIONS = 2048  # a head's temperature is known to about a grid step by then; the rest is left out evenly
ROWS_AT_ONCE = 64  # rows that stay in a processor's cache while all temperatures are tried on them
SAMPLED_AT = 0.7  # the temperature of the sampled answers, when rows do not say
LEAST_COVERAGE = 1e-3  # where none of these answers' tokens is in the draft vocabulary, another's may be


def calibrate(
    drafter: ScoringDrafter, rows: Sequence[TokenRow], hidden: HiddenStates, loss_config: LossConfig
) -> tuple[Calibration, dict[str, Any]]:
    """(calibration, what was measured with it), for a drafter on held-out rows.

    Of several temperatures the sampled answers count as of the middle one. raises DataError where heads have nothing to
    guess.
    """
    check_measurable(rows)
    was_training = drafter.training
    drafter.eval()
    greedy_rows = [row for row in rows if row.temperature == 0] or list(rows)
    sampled_rows = [row for row in rows if row.temperature] or list(rows)
    at = _within_bounds(median_low([row.temperature for row in rows if row.temperature] or [SAMPLED_AT]))
    greedy = head_temperatures(drafter, greedy_rows, hidden)
    sampled = [_within_bounds(t / at) for t in head_temperatures(drafter, sampled_rows, hidden)]
    covered = max(coverage(rows, drafter.draft_ids), LEAST_COVERAGE)
    drafter.calibration = Calibration(greedy=greedy, sampled=sampled, coverage=covered)
    measured: dict[str, Validation] = {
        "greedy": validate(drafter, greedy_rows, hidden, loss_config),
        "sampled": validate(drafter, sampled_rows, hidden, loss_config, temperature=at),
    }
    accuracy = _rank_accuracy(measured["greedy"], measured["sampled"])
    calibration = Calibration(greedy=greedy, sampled=sampled, coverage=covered, accuracy=accuracy)
    drafter.train(was_training)
    record = {name: _recorded(v) for name, v in measured.items()}
    return calibration, record


def _within_bounds(temperature: float) -> float:
    """As a calibration may hold it: answers sampled near 0 would have heads divided by thousands."""
    least, most = HEAD_TEMPERATURES
    return min(max(temperature, least), most)


def _recorded(part: Validation) -> dict[str, Any]:
    return {
        "tau": part.tau,
        "tau_loop_free": part.tau_loop_free,
        "acceptance": part.acceptance,
        "top": part.top,
        "positions": part.num_positions,
        "trees": part.trees,
    }


def _rank_accuracy(*parts: Validation) -> list[list[float]]:
    """Accuracy of each (depth, rank) alone, over all rows: differences of the cumulative top-r accuracies."""
    total = sum(part.num_positions for part in parts)
    top = sum(torch.tensor(part.top) * (part.num_positions / total) for part in parts)
    assert isinstance(top, Tensor)
    alone = torch.diff(top, dim=1, prepend=torch.zeros(top.shape[0], 1))
    return [[round(value, 6) for value in ranks] for ranks in alone.clamp_min(0).tolist()]


@torch.inference_mode()
def head_temperatures(drafter: ScoringDrafter, rows: Sequence[TokenRow], hidden: HiddenStates) -> list[float]:
    """The best divisor of each head's logits on a grid of step 0.05."""
    device = drafter.device
    stride = max(1, sum(row.num_answer_tokens for row in rows) // MAX_POSITIONS)
    losses = torch.zeros(drafter.num_heads, len(GRID), dtype=torch.float64)
    for on_cpu in batches_of(rows, hidden, 8):
        batch = on_cpu.to(device)
        states = drafter(batch.hidden, batch.next_ids, batch.answer_rows.rows)
        labels = draft_labels(drafter, batch.answer_rows.next_ids)
        for k in range(drafter.num_heads):
            index = batch.answer_rows.aims(k)[::stride]
            wanted = labels[index + k + 1]
            index, wanted = index[wanted >= 0], wanted[wanted >= 0]
            if index.numel():
                above = batch.answer_rows.next_ids[index + k]
                logits = exact_logits_below(drafter, states[index, k], k, above)
                losses[k] += losses_by_temperature(logits, wanted)
    return [round(float(GRID[i]), 2) for i in losses.argmin(1)]


def losses_by_temperature(logits: Tensor, wanted: Tensor) -> Tensor:
    """Negative log-likelihood [grid] of the wanted tokens [M] under logits [M, N] divided by each temperature."""
    losses = torch.zeros(len(GRID), dtype=torch.float64)
    for some, ids in zip(logits.split(ROWS_AT_ONCE), wanted.split(ROWS_AT_ONCE), strict=True):
        picked = some.gather(-1, ids[:, None]).squeeze(-1)
        found = [(torch.logsumexp(some / t, -1) - picked / t).sum() for t in GRID.tolist()]
        losses += torch.stack(found).double().cpu()
    return losses
