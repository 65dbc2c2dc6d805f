"""What torch's adaptive optimizers divide by, read from their state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noisescale.errors import InvalidInputError
from noisescale.measure.rules.parts import wide

KINDS = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop)
"""Optimizers whose state is understood; AdamW is an Adam."""

LEAST_STEPS = 10
"""Updates behind second moments that are divided by: the mean of 1/v over n squared normal
gradients is n/(n - 2) times 1/mean, infinite up to n = 2, and steps with few of them, however
large, would make up the whole average. (assumed)"""

# RAdam steps without second moments while the length of their average is at most this.
# Source: Liu et al. 2020 (arXiv:1908.03265), algorithm 2, as torch has it.
_RADAM_LENGTH = 5.0


Scalar = float | Tensor
"""A number, or a 0-d tensor where reading it would wait for a device."""


class SecondMoment(NamedTuple):
    """The optimizer divides by (sqrt(value) + eps) / sqrt(correction).

    Attributes:
        value: running average of squared gradients, the parameter's shape.
        correction: what corrects its bias, 1 - beta2^t; a tensor where the count is on a device.
        eps: as it is added to the root of ``value``.
        memory: beta2, of the running average.
        average: whether ``value / correction`` is a plain average of squared gradients.
        steps: updates it has seen.
    """

    value: Tensor
    correction: Scalar
    eps: Scalar
    memory: float
    average: bool
    steps: Scalar


def check_kind(optimizer: object) -> None:
    """Refuse an optimizer whose second moments cannot be read.

    Raises:
        InvalidInputError: it is none of :data:`KINDS`.
    """
    if isinstance(optimizer, KINDS):
        return
    what = "none" if optimizer is None else type(optimizer).__name__
    raise InvalidInputError(
        f"preconditioner 'adam' with optimizer {what}",
        "torch's Adam, AdamW, NAdam, RAdam or RMSprop is required",
        "pass the optimizer that trains the model, or preconditioner='none'",
    )


def kind_name(optimizer: torch.optim.Optimizer) -> str:
    """Return how records call the norm."""
    return "rmsprop" if isinstance(optimizer, torch.optim.RMSprop) else "adam"


def second_moment(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]
) -> SecondMoment | None:
    """Read one parameter's second moment; None if there is none yet.

    Args:
        optimizer: of one of :data:`KINDS`.
        group: the parameter group that holds the parameter.
        state: ``optimizer.state[parameter]``.
    """
    if isinstance(optimizer, torch.optim.RMSprop):
        return _rmsprop(group, state)
    if "exp_avg_sq" not in state:
        return None
    steps = _number(state["step"])
    beta2 = float(group["betas"][1])
    correction = 1 - beta2**steps
    # RAdam corrects after it has added eps.
    late = isinstance(optimizer, torch.optim.RAdam)
    eps = group["eps"] if late else group["eps"] * correction**0.5
    largest = group.get("amsgrad", False)
    value = wide(state["max_exp_avg_sq" if largest else "exp_avg_sq"])
    return SecondMoment(value, correction, eps, beta2, not largest, steps)


def _rmsprop(group: Mapping[str, Any], state: Mapping[str, Any]) -> SecondMoment | None:
    if "square_avg" not in state:
        return None
    value = wide(state["square_avg"])
    if group["centered"]:
        # Rounding alone makes it negative.
        value = (value - wide(state["grad_avg"]).square()).clamp_min_(0)
    steps = _number(state["step"])
    return SecondMoment(value, 1.0, group["eps"], float(group["alpha"]), False, steps)


def too_few(optimizer: torch.optim.Optimizer, moment: SecondMoment) -> str:
    """Say why a second moment is not divided by yet; empty where it is."""
    steps = float(moment.steps)
    if steps < LEAST_STEPS:
        return f"second moments of fewer than {LEAST_STEPS} updates are too noisy to divide by"
    if isinstance(optimizer, torch.optim.RAdam):
        decayed = moment.memory**steps
        length = 2 / (1 - moment.memory) - 1 - 2 * steps * decayed / (1 - decayed)
        if length <= _RADAM_LENGTH:
            return "RAdam takes its first steps without second moments"
    return ""


def _number(count: float | Tensor) -> Scalar:
    """A count as a float, unless it is on a device."""
    if isinstance(count, Tensor):
        return count if count.device.type != "cpu" else float(count)
    return float(count)


def root(number: Scalar) -> Scalar:
    """Square root of a number or a 0-d tensor."""
    return number.sqrt() if isinstance(number, Tensor) else math.sqrt(number)
