"""Models watched by source ``examples``, against a separate backward pass per example."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory, StepNorms
from reference import flat, per_example_gradients

WIDTH = 6


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batch_of(n=8, *shape):
    torch.manual_seed(1)
    return torch.randn(n, *(shape or (WIDTH,))).double(), torch.randint(0, 3, (n,))


class Body(nn.Module):
    """linear -> what a test is about, given as a function of the model -> head."""

    def __init__(self, inside=lambda model, h: model.m(h), **modules):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.inside = inside
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.head(self.inside(self, torch.tanh(self.first(x))))


def linear():
    return nn.Linear(WIDTH, WIDTH)


def layers(*extra):
    return nn.Sequential(linear(), *extra, nn.Tanh(), linear())


def watch(model, step, batch=None, *, steps=5, truth=None):
    """Measure a few steps, the last of them after every check of the first ones was passed.

    Args:
        step: ``step(model, batch)`` returns the loss, or None after its own backward passes; a
            list says what each step does.
    """
    model.double()
    batch = batch_of() if batch is None else batch
    source = ExamplesSource(model, Inventory(model))
    for i in range(steps):
        model.zero_grad()
        source.open()
        value = (step[min(i, len(step) - 1)] if isinstance(step, list) else step)(model, batch)
        if value is not None:
            value.backward()
        result = source.close()
    source.detach()
    return source, result


def check(model, step=loss, batch=None, *, truth=loss, **options):
    """Seen parameters are exact; returns the reasons of the others."""
    batch = batch_of() if batch is None else batch
    source, norms = watch(model, step, batch, **options)
    assert isinstance(norms, StepNorms), norms
    missing = source.inventory.missing
    rows = {k: v for k, v in per_example_gradients(model, truth, batch).items() if k not in missing}
    assert norms.examples == len(batch[0])
    assert float(norms.weighted.sum()) * norms.weighted_factor == pytest.approx(
        float(flat(rows).square().sum()), rel=1e-9
    )
    assert float(norms.mean.sum()) * norms.mean_factor == pytest.approx(
        float(flat(rows).mean(0).square().sum()), rel=1e-9
    )
    return missing
