"""Intervals under an optimizer's norm contain a truth that is known as often as they say.

A small version of benchmarks/coverage_preconditioned.py, through the meter itself.
"""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binom
from torch import nn

from noisescale import NoiseMeter
from noisescale.measure.preconditioned import AdamNorm

SERIES, STEPS, SIZE, DIMENSION = 50, 20, 8, 6


@pytest.mark.parametrize(("power", "at_most"), [(2, None), (2, 4), (1, None)])
def test_intervals_cover(power, at_most):
    """At least as often as 92 % would in all but 1e-4 of the cases."""
    torch.manual_seed(0)
    mean = torch.linspace(0.5, 1.0, DIMENSION).double()
    sd = torch.linspace(4.0, 0.5, DIMENSION).double()
    model = nn.Linear(DIMENSION, 1, bias=False).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 1 - 1e-12), eps=1e-12)
    state = optimizer.state[model.weight]
    v = mean**2 + sd**2 / SIZE
    # The bias of an average that began long ago: none.
    state["step"], state["exp_avg"] = torch.tensor(1e15), torch.zeros(1, DIMENSION).double()
    state["exp_avg_sq"] = v.view(1, -1).clone()
    weight = v ** (-power / 2)
    truth = float((weight * sd**2).sum() / (weight * mean**2).sum())
    norm = AdamNorm(power=power, at_most=at_most)
    meter = NoiseMeter(model, optimizer, preconditioner=norm)
    for x in torch.randn(SERIES * STEPS, SIZE, DIMENSION, dtype=torch.float64):
        optimizer.zero_grad()
        model(mean + sd * x).mean().backward()
        optimizer.step()
    found = [meter.estimate(first=i, last=i + STEPS) for i in range(0, SERIES * STEPS, STEPS)]
    covered = sum((e.low or 0) <= truth <= (e.high or float("inf")) for e in found)
    assert covered >= binom.ppf(1e-4, SERIES, 0.92)
    assert float(v[0]) == pytest.approx(float(state["exp_avg_sq"][0, 0]), rel=1e-6)
