"""A workload that other processes can load, whose loss can be fatal there."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisescale.workload import Workload
from run.trials.small import error, perceptron, small_workload

PARENT = "TRIALS_TEST_PARENT"
"""Names the process in which nothing happens, and switches the rest on."""

FATAL = 1e4


def double(model: Any) -> nn.Module:
    made: nn.Module = model().to(torch.float64)
    return made


def smoothed(model: Any, batch: Any) -> Tensor:
    """Ends its process where outputs are huge, unless it is the parent."""
    outputs = model(batch[0])
    elsewhere = os.environ.get(PARENT, str(os.getpid())) != str(os.getpid())
    if elsewhere and bool((outputs.detach().abs() > FATAL).any()):
        os._exit(7)
    return F.cross_entropy(outputs, batch[1], label_smoothing=0.1)


def dropping() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.Dropout(0.5), nn.Linear(16, 4))


def perilous(model: Any = perceptron) -> Workload:
    workload = small_workload(loss=smoothed, metrics=error)
    return dataclasses.replace(workload, model=partial(double, model))
