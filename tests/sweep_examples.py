"""A sweep's result made without training, from a known surface."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn, ones, randn

import noisescale.run.trials as trials
import response_surfaces as surfaces
from noisescale import Workload
from noisescale.records import SweepResult


def workload(**changes: Any) -> Workload:
    """A workload that is only looked at, never trained."""
    data = randn(512, 3)
    options = {
        "name": "surface",
        "model": lambda: nn.Linear(3, 1),
        "loss": lambda model, batch: (model(batch)[:, 0] - batch[:, 0]).square().mean(),
        "train": data,
        "evaluate": data[:64],
        "recipe": surfaces.RECIPE,
        "metrics": lambda model, batch: {"error": ones(len(batch))},
    }
    return Workload(**{**options, **changes})


@functools.cache
def example(kind: str = "whole") -> SweepResult:
    """Return the result of a sweep.

    Args:
        kind: ``whole``; ``unreached``, whose target is out of reach; ``nothing``, where time was
            up at once.
    """
    from noisescale.run.sweep.driver import sweep

    options: dict[str, dict[str, Any]] = {
        "whole": {"batch_sizes": "1:512", "max_steps": 20_000},
        "unreached": {"batch_sizes": "8,32", "max_steps": 3},
        "nothing": {"batch_sizes": "8,32", "seconds": 1e-9},
    }
    real, trials.train_trials = trials.train_trials, surfaces.train
    try:
        targets = ["validation_error<0.05", "validation_error<0.02"]
        return sweep(workload(), targets=targets, **options[kind])
    finally:
        trials.train_trials = real
