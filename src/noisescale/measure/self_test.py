"""Compare per-example norms with separate backward passes of a few examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from noisescale.errors import InvalidInputError
from noisescale.measure.batches import batch_size_of, slices
from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory, Refused
from noisescale.measure.microbatches import gradients_of
from noisescale.measure.squares import squared_norm
from noisescale.measure.untouched import untouched

# Largest relative difference of squared norms that rounding explains. (assumed; what is wrong
# is wrong by more)
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_HALF = 5e-2

# Below this share of the whole model's squared norm a parameter's gradient is rounding. (assumed)
_NOTHING = 1e-9


@dataclass(frozen=True)
class SelfTest:
    """What a self-test found.

    Attributes:
        agrees: whether every parameter that is measured by example is measured right.
        examples: how many examples were differentiated one by one.
        errors: relative error of the sum of squared per-example norms, by parameter.
        wrong: the parameters whose error rounding does not explain.
        missing: the parameters that are left out, with the reason of each.
        detail: one line for people.
    """

    agrees: bool
    examples: int
    errors: dict[str, float]
    wrong: tuple[str, ...]
    missing: dict[str, str]
    detail: str


def check_meter(
    meter: Any, batch: Any, loss: Callable[[nn.Module, Any], Tensor], *, examples: int = 4
) -> SelfTest:
    """Compare source ``examples`` with a separate backward pass for each of a few examples.

    Call it between steps, whatever the meter's source. It finds what no measurement can see by
    itself: a rule of your own that is wrong, and losses or models that mix the examples of a
    batch. Dropout layers are switched off for it; ``p.grad``, random states, buffers and modes
    are left as they were.

    Args:
        meter: the meter.
        batch: tensors, or nested tuples and mappings of tensors, batch first.
        loss: ``loss(model, batch)`` returns the scalar that training differentiates, not scaled.
        examples: how many examples of the batch to use, 2 at least.

    Raises:
        InvalidInputError: the batch has fewer examples, or the loss is not a scalar.
    """
    size = batch_size_of(batch)
    if not 2 <= examples <= size:
        raise InvalidInputError(
            f"examples {examples}",
            f"2 to {size} is required, the examples of the batch",
            "give a larger batch, or ask for fewer",
        )
    few = next(iter(slices(batch, examples)))
    options = {"loss_reduction": meter._loss_reduction, "batch_size_of": meter._batch_size_of}
    meter._source.pause()
    try:
        with untouched(meter.model), torch.enable_grad():
            for module in meter.model.modules():
                if isinstance(module, _DropoutNd | nn.MultiheadAttention | nn.RNNBase):
                    module.training = False
            return compare(meter.model, few, loss, options)
    finally:
        meter._arm()


def compare(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], options: dict[str, Any]
) -> SelfTest:
    """Differentiate a batch by example and one by one, and compare parameter by parameter."""
    size = batch_size_of(batch)
    inventory = Inventory(model)
    watch = ExamplesSource(model, inventory, any_mode=True, **options)
    try:
        watch.open()
        norms = watch.close(dict(gradients_of(loss(model, batch), inventory)))
    finally:
        watch.detach()
    if norms is None or isinstance(norms, Refused):
        why = "no gradient arrived" if norms is None else norms.detail
        return SelfTest(False, 0, {}, (), inventory.missing, why)
    found = (norms.weighted.double() * norms.weighted_factor).tolist()
    truth = _one_by_one(model, batch, loss, inventory)
    floor = _NOTHING * sum(truth)
    errors: dict[str, float] = {}
    wrong: list[str] = []
    for index in inventory.seen:
        slot = inventory.slots[index]
        gap = abs(found[index] - truth[index])
        errors[slot.name] = gap / truth[index] if truth[index] else gap
        bound = _TOLERANCE.get(slot.tensor.dtype, _TOLERANCE_HALF)
        if not gap <= bound * (truth[index] + floor):
            wrong.append(slot.name)
    return SelfTest(
        not wrong, size, errors, tuple(wrong), inventory.missing, _detail(errors, wrong, inventory)
    )


def _one_by_one(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor], inventory: Inventory
) -> list[float]:
    sums = [0.0] * len(inventory.slots)
    for example in slices(batch, 1):
        for index, gradient in gradients_of(loss(model, example), inventory):
            sums[index] += float(squared_norm(gradient))
    return sums


def _detail(errors: dict[str, float], wrong: list[str], inventory: Inventory) -> str:
    if wrong:
        worst = max(wrong, key=lambda name: errors[name])
        return (
            f"{len(wrong)} of {len(errors)} parameters differ from separate backward passes, "
            f"{worst} by {errors[worst]:.2g}: the loss or the model mixes the examples of a batch, "
            "draws random numbers, or a rule is wrong; use source='microbatches'"
        )
    largest = max(errors.values(), default=0.0)
    left = f"; {len(inventory.missing)} left out by name" if inventory.missing else ""
    return f"{len(errors)} parameters agree with separate backward passes to {largest:.1g}{left}"
