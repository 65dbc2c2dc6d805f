"""One step measured by an extra pass over the micro-batches of its batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from noisescale.measure.gradients import GradientSource, Refused, StepNorms
from noisescale.measure.microbatches import split_gradients
from noisescale.measure.untouched import untouched
from noisescale.measure.verdict import SplitCost


def split_norms(
    loss: Callable[[nn.Module, Any], Tensor],
    source: GradientSource,
    batch: Any,
    micro_batch_size: int,
    *,
    loss_reduction: str,
) -> tuple[StepNorms | Refused, SplitCost]:
    """Return the norms of a batch that is run in parts, and what that cost.

    Args:
        loss: ``loss(model, micro_batch)`` returns a scalar.
        source: whose model, parameters and norm are meant; the norm is the one before the
            optimizer's step.
        batch: tensors, or nested tuples and mappings of tensors, batch first.
        micro_batch_size: examples per micro-batch.
        loss_reduction: whether the loss is a mean or a sum over the examples.

    Raises:
        InvalidInputError: the loss is not a scalar, or the size is not positive.
    """
    model, inventory, metric = source.model, source.inventory, source.metric
    metric.freeze()
    started = time.perf_counter()
    with untouched(model), torch.enable_grad():
        found = split_gradients(
            loss,
            model,
            inventory,
            batch,
            micro_batch_size,
            loss_reduction=loss_reduction,
            metric=metric,
        )
    cost = SplitCost(len(found.sizes), sum(found.sizes), time.perf_counter() - started)
    if len(found.sizes) < 2:
        refusal = (
            f"micro_batch_size {micro_batch_size} does not split a batch of {found.sizes[0]}; "
            "give at most half of it"
        )
        return Refused(refusal), cost
    norms = found.step_norms(inventory, metric)
    return (Refused(metric.refusal) if metric.refusal else norms), cost
