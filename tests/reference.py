"""Slow, obvious versions of what noisescale computes: the oracle of its tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def to_double(value: Any) -> Any:
    """Copy nested containers with floating tensors in float64."""
    if isinstance(value, Tensor):
        return value.detach().clone().double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: to_double(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_double(v) for v in value)
    return value


def double_copy(model: nn.Module) -> nn.Module:
    """A float64 copy that shares nothing with the model."""
    twin = copy.deepcopy(model).double()
    twin.zero_grad()
    return twin


def gradient(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any
) -> dict[str, Tensor]:
    """One backward pass: name -> gradient."""
    model.zero_grad()
    loss(model, batch).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def per_example_gradients(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """A separate backward pass per example: name -> (examples, *shape), float64.

    ``loss`` is a mean over the batch, so that of one example it is the example's own.
    """
    twin, batch = double_copy(model), to_double(batch)
    rows = [
        gradient(twin, loss, tuple(part[i : i + 1] for part in batch)) for i in range(len(batch[0]))
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """(examples, parameters) matrix of per-example gradients."""
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def sample_moments(rows: Tensor) -> tuple[float, float]:
    """|G|^2 and tr(Sigma) of a matrix (examples, parameters), by the textbook.

    The trace of the sample covariance with divisor n - 1, and |mean|^2 less its bias.
    """
    trace = float(rows.var(dim=0, correction=1).sum())
    return float(rows.mean(0).square().sum()) - trace / len(rows), trace


def microbatch_moments(rows: Tensor, size: int) -> tuple[float, float]:
    """The same from the means of consecutive micro-batches of equal size."""
    means = rows.reshape(-1, size, rows.shape[1]).mean(1)
    grad_sq, trace = sample_moments(means)
    return grad_sq, trace * size


def census(rows: Tensor) -> tuple[float, float]:
    """|G|^2 and tr(Sigma) of a population given in full (divisor N)."""
    return float(rows.mean(0).square().sum()), float(rows.var(dim=0, correction=0).sum())
