"""Extra passes that leave no trace: random state, buffers and train or eval mode come back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.jit import ScriptModule

T = TypeVar("T")


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run extra passes of ``model`` and put back everything but what they return.

    Buffers are swapped for copies rather than written back, so that graphs which saved them
    stay valid. Random states of torch (CPU and the model's CUDA devices), numpy, Python and of
    generators that modules hold are restored, as is every module's training flag.
    """
    compiled = [m for m in model.modules() if isinstance(m, ScriptModule)]
    buffers = [(m, dict(m._buffers)) for m in model.modules() if not isinstance(m, ScriptModule)]
    # Those of what torch.jit compiled cannot be swapped.
    fixed = [(b, b.clone()) for m in compiled for b in m.buffers(recurse=False)]
    modes = [(m, m.training) for m in model.modules()]
    states = (random.getstate(), np.random.get_state())  # noqa: NPY002 - the user's, not ours
    own_states = [(g, g.get_state()) for g in _held(model, torch.Generator)]
    numpy_states = [(g, g.bit_generator.state) for g in _held(model, np.random.Generator)]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        for module, own in buffers:
            for key, value in own.items():
                module._buffers[key] = None if value is None else value.clone()
        try:
            yield
        finally:
            for module, kept in buffers:
                module._buffers.clear()
                module._buffers.update(kept)
            for buffer, value in fixed:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
            for module, mode in modes:
                module.training = mode
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            for generator, state in own_states:
                generator.set_state(state)
            for numpys, known in numpy_states:
                numpys.bit_generator.state = known


def _held(model: nn.Module, kind: type[T]) -> list[T]:
    """Generators that modules hold as attributes of their own."""
    return [v for m in model.modules() for v in vars(m).values() if isinstance(v, kind)]
