"""Which row made a loss that is not finite? Asked once, when a run has to stop anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from amphista.errors import DataError
from amphista.train.dataset import HiddenStates, collate, idle_batch, part_of
from amphista.train.head_loss import HeadLoss
from amphista.train.token_row import TokenRow


@torch.no_grad()
def not_finite(accelerator: Accelerator, model: HeadLoss, rows: Sequence[TokenRow], hidden: HiddenStates) -> DataError:
    """The error for a batch without a finite loss: names its rows that have none by themselves, or the weights.

    Every process calls it with the whole batch, and all run the same number of forwards (FSDP needs that).
    """
    mine = part_of(rows, accelerator.process_index, accelerator.num_processes)
    most = len(part_of(rows, 0, accelerator.num_processes))
    loss_of = accelerator.unwrap_model(model)
    bad = []
    for index in range(most):
        some = mine[index : index + 1]
        batch = collate(some, hidden.get(some)) if some else idle_batch(loss_of.drafter.spec.hidden_size)
        batch = batch.to(accelerator.device)
        losses = loss_of(batch.hidden, batch.next_ids, batch.answer_rows).losses
        if not torch.isfinite(losses).all():
            bad += [row.id for row in some]
    broken = [name for name, p in loss_of.named_parameters() if not torch.isfinite(_local(p)).all()]
    bad, broken = gather_object([*bad]), gather_object(broken)
    if broken:
        return DataError(f"the loss is not finite, nor is the weight {broken[0]}: lower optimizer.learning_rate")
    if not bad:
        return DataError(
            f"the loss of these rows together is not finite, though it is alone: {', '.join(row.id for row in rows)}: "
            "lower optimizer.learning_rate"
        )
    return DataError(
        f"the loss is not finite for row {', '.join(map(repr, sorted(bad)))}: leave it out of the data, or lower "
        "optimizer.learning_rate if rows go on to fail"
    )


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a weight; all of it where nothing shards it."""
    to_local = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()
