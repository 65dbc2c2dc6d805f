"""One cheap pass through a workload, so that what is wrong with it is told before measuring."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from noisescale.errors import InvalidInputError, nearest
from noisescale.measure.batches import move, take
from noisescale.records import Target
from noisescale.run.evaluation import evaluating
from noisescale.run.users_code import blame_user
from noisescale.workload import Workload, data_size

_EXAMPLES = 3
"""Small and unlike any usual dimension, so that a per-example shape can be told."""


_NEAR_ZERO = 1e-6
"""A loss this small may be rounding, which shows no proportion. (assumed)"""

_IN_PROPORTION = 0.05
"""A loss within this share of proportional to the batch is a sum. (assumed)"""


def check_workload(workload: Workload, *, target: Target | None = None) -> None:
    """Try model, loss and metrics on three examples.

    The caller's random state is left as it was.

    Args:
        workload: what to try.
        target: the goal that will be used; its quantity must exist.

    Raises:
        InvalidInputError: the batch is larger than the data, ``model()`` is no module or has
            nothing to train, the loss is no scalar with a gradient or a sum over the
            examples, a metric does not give
            one value per example, the target's quantity does not exist, or the user's code
            raised.
    """
    check_batch_size(workload, workload.recipe.batch_size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fresh_model(workload)
        batch = _few_examples(workload, model)
        _check_loss(workload, model, batch)
        _check_mean(workload, model)
        names = _check_metrics(workload, model, batch)
    if target is not None:
        check_target(workload, target, names)


def check_batch_size(workload: Workload, batch_size: int) -> None:
    """Refuse a batch that is larger than the training data.

    Raises:
        InvalidInputError: it is.
    """
    if batch_size > workload.train_size:
        raise InvalidInputError(
            f"batch size {batch_size}",
            f"workload {workload.name!r} has {workload.train_size} training"
            f" {_unit(workload)}, and a batch cannot be larger",
            f"choose at most {workload.train_size}",
        )


def fresh_model(workload: Workload) -> nn.Module:
    """Return a new model; the caller seeds torch.

    Raises:
        InvalidInputError: it is no module, has no trainable parameter, or making it failed.
    """
    with blame_user(f"workload {workload.name!r}: model()"):
        model = workload.model()
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            f"workload {workload.name!r}: model() returned a {type(model).__name__}",
            "a torch.nn.Module is required",
            "return the model itself",
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidInputError(
            f"workload {workload.name!r}: model {type(model).__name__}",
            "at least one trainable parameter is required",
            "leave requires_grad on for what is to be trained",
        )
    return model


def check_target(workload: Workload, target: Target, metrics: list[str]) -> None:
    """Refuse a target whose quantity the workload does not have.

    Raises:
        InvalidInputError: there is no such metric, or no validation data.
    """
    if target.split == "validation" and workload.evaluate is not None:
        with blame_user(f"workload {workload.name!r}: evaluate"):
            size = data_size(workload.evaluate)
        if size == 0:
            raise InvalidInputError(
                f"target {str(target)!r}",
                f"workload {workload.name!r} has evaluate with 0 examples",
                "give it evaluate=... with validation data or choose a train_ target",
            )
    if target.split == "validation" and workload.evaluate is None:
        raise InvalidInputError(
            f"target {str(target)!r}",
            f"workload {workload.name!r} has no validation data",
            "give it evaluate=... or choose a train_ target",
        )
    if target.metric not in ["loss", *metrics]:
        raise InvalidInputError(
            f"target {str(target)!r}",
            f"workload {workload.name!r} has no metric {target.metric!r}",
            nearest(target.metric, ["loss", *metrics]),
        )


def _few_examples(workload: Workload, model: nn.Module, *, repeats: int = 1) -> Any:
    with blame_user(f"workload {workload.name!r}: reading its data"):
        indices = torch.arange(min(_EXAMPLES, workload.train_size)).repeat(repeats)
        batch = take(workload.train, indices, workload.collate)
    return move(batch, next(model.parameters()).device)


def _check_loss(workload: Workload, model: nn.Module, batch: Any) -> None:
    with blame_user(f"workload {workload.name!r}: loss(model, batch)"):
        loss = workload.loss(model, batch)
    got = f"workload {workload.name!r}: loss(model, batch) returned"
    if not isinstance(loss, torch.Tensor):
        raise InvalidInputError(
            f"{got} a {type(loss).__name__}",
            "a scalar tensor is required",
            "return the mean loss over the batch without .item()",
        )
    if loss.numel() != 1:
        raise InvalidInputError(
            f"{got} a tensor of shape {tuple(loss.shape)}",
            "a scalar is required",
            "return the mean over the batch's examples",
        )
    if not loss.requires_grad:
        raise InvalidInputError(
            f"{got} a tensor without a gradient",
            "it must depend on the model's trainable parameters",
            "compute it from the model's output without detach() or no_grad()",
        )


def _check_mean(workload: Workload, model: nn.Module) -> None:
    """Refuse a loss that grows with the batch: the same examples again leave a mean alone."""

    def loss_of(repeats: int) -> float:
        torch.manual_seed(0)
        batch = _few_examples(workload, model, repeats=repeats)
        with blame_user(f"workload {workload.name!r}: loss(model, batch)"), evaluating(model):
            return float(workload.loss(model, batch))

    once = loss_of(1)
    if not math.isfinite(once) or abs(once) < _NEAR_ZERO:
        return
    # In proportion twice, so that what only happens to double (random data) is let through.
    if all(abs(loss_of(n) / once - n) <= _IN_PROPORTION * n for n in (2, 3)):
        raise InvalidInputError(
            f"workload {workload.name!r}: loss(model, batch) doubles when every example of the"
            " batch is there twice",
            "the mean over the examples is required, and this is a sum",
            "divide by the number of examples or use reduction='mean'",
        )


def _check_metrics(workload: Workload, model: nn.Module, batch: Any) -> list[str]:
    """Return the metrics' names."""
    if workload.metrics is None:
        return []
    with (
        blame_user(f"workload {workload.name!r}: metrics(model, batch)"),
        torch.no_grad(),
    ):
        values = dict(workload.metrics(model, batch))
    examples = min(_EXAMPLES, workload.train_size)
    for name, value in values.items():
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        if shape != (examples,):
            got = f"shape {shape}" if shape is not None else f"a {type(value).__name__}"
            raise InvalidInputError(
                f"workload {workload.name!r}: metric {name!r} of {examples} examples has {got}",
                "a tensor with one value per example is required",
                "do not average it",
            )
    return list(values)


def _unit(workload: Workload) -> str:
    return "examples" if workload.recipe.unit == "examples" else "sequences"
