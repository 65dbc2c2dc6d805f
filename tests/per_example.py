"""Compare source ``examples`` with the slow loop, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory, StepNorms
from reference import per_example_gradients

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def mean_square(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """A loss of any output: every element counts differently."""
    out = model(*batch)
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view_as(out[0])
    return (torch.sin(out) * weights).flatten(1).sum(1).mean()


def cross_entropy(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """A language model's loss."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def measured(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: tuple[Tensor, ...]
) -> tuple[ExamplesSource, StepNorms]:
    """One step's norms by the source."""
    source = ExamplesSource(model, Inventory(model))
    source.open()
    loss(model, batch).backward()
    norms = source.close()
    source.detach()
    model.zero_grad()
    assert isinstance(norms, StepNorms), norms
    return source, norms


def assert_exact(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    loss: Callable[[nn.Module, Any], Tensor] = mean_square,
    dtype: torch.dtype = torch.float64,
    left_out: set[str] = frozenset(),
) -> ExamplesSource:
    """Every parameter but ``left_out`` has the squares of a separate backward pass each."""
    model = model.to(dtype)
    batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)
    truth = per_example_gradients(model, loss, batch)
    source, norms = measured(model, loss, batch)
    assert set(source.inventory.missing) == set(left_out), source.inventory.missing
    for i, (name, rows) in enumerate(truth.items()):
        assert source.inventory.slots[i].name == name
        if name in left_out:
            continue
        # Gradients of parts that cancel (a normalised constant) are rounding alone.
        floor = (1e-20 if dtype == torch.float64 else 1e-9) * max(1, rows.numel() ** 0.5)
        assert float(norms.weighted[i]) * norms.weighted_factor == pytest.approx(
            float(rows.square().sum()), rel=TOLERANCE[dtype], abs=floor
        ), name
    return source
