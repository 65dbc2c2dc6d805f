"""Extra passes that leave no trace: random state, buffers and train or eval mode come back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run extra passes of ``model`` and put back everything but what they return.

    Buffers are swapped for copies rather than written back, so that graphs which saved them
    stay valid. Random states of torch (CPU and the model's CUDA devices), numpy and Python
    are restored, as is every module's training flag.
    """
    buffers = [(m, dict(m._buffers)) for m in model.modules()]
    modes = [(m, m.training) for m in model.modules()]
    states = (random.getstate(), np.random.get_state())  # noqa: NPY002 - the user's, not ours
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        for module, own in buffers:
            for key, value in own.items():
                module._buffers[key] = None if value is None else value.clone()
        try:
            yield
        finally:
            for module, own in buffers:
                module._buffers.clear()
                module._buffers.update(own)
            for module, mode in modes:
                module.training = mode
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
