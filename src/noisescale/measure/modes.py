"""How per-example norms are computed, and the norm that goes with it."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from noisescale.errors import InvalidInputError
from noisescale.measure.arguments import check_choice
from noisescale.measure.gradients import Inventory
from noisescale.measure.metric import Metric
from noisescale.measure.preconditioned import Preconditioner, metric_of
from noisescale.measure.sketched import Sketched

Mode = Literal["exact", "fused", "sketch"]
MODES: tuple[Mode, ...] = get_args(Mode)


def check_mode(mode: str, source: str, preconditioner: Preconditioner) -> None:
    """Refuse a mode that does not exist or does not go with the other options."""
    check_choice("mode", mode, MODES)
    if mode == "exact":
        return
    if source == "microbatches":
        raise InvalidInputError(
            f"mode {mode!r} with source 'microbatches'",
            "source 'examples' or 'auto' is required",
            "leave mode out: micro-batches cost no more than their squared norms",
        )
    if preconditioner != "none":
        raise InvalidInputError(
            f"mode {mode!r} with a preconditioner",
            "mode 'exact' is required",
            "leave mode out; AdamNorm(at_most=...) makes preconditioned norms cheaper",
        )


def norm_of(
    mode: Mode,
    preconditioner: Preconditioner,
    optimizer: torch.optim.Optimizer | None,
    inventory: Inventory,
    loss_reduction: str,
) -> Metric:
    """Make the norm that a meter with these options squares gradients under."""
    if mode == "sketch":
        return Sketched()
    return metric_of(preconditioner, optimizer, inventory, loss_reduction)
