"""Models that are copied or saved as a whole while a meter is attached."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from noisescale import NoiseMeter

MODES = ("exact", "fused", "sketch")


def network():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(16).eval()
    return nn.Sequential(nn.Linear(8, 16), norm, nn.Tanh(), nn.Linear(16, 8))


def step(model, meter, x):
    model.zero_grad()
    model(x).square().mean().backward()
    meter.close_step()


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    assert b"noisescale" not in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", [copy.deepcopy, saved, pickled])
def test_a_copy_is_not_attached(way, mode):
    model = network()
    meter = NoiseMeter(model, mode=mode, source="examples")
    reference = NoiseMeter(network(), mode=mode, source="examples")
    torch.manual_seed(1)
    x = torch.randn(6, 8)
    for _ in range(2):
        model[1].eval()
        step(model, meter, x)
        reference.model[1].eval()
        step(reference.model, reference, x)
    other = way(model)
    assert torch.equal(other(x), model(x))
    other.train()
    for _ in range(2):
        other.zero_grad()
        other(x).square().mean().backward()
    assert all(p.grad is not None for p in other.parameters())
    for p in other.parameters():
        p.data.zero_()
    step(model, meter, x)
    step(reference.model, reference, x)
    assert meter.missing == {}
    assert meter.history.trace_cov.tolist() == reference.history.trace_cov.tolist()
    own = NoiseMeter(other, mode=mode, source="microbatches" if mode == "exact" else "auto")
    own.detach()


def test_a_copy_holds_nothing_of_the_meter():
    model = network()
    meter = NoiseMeter(model)
    hooks = [
        hook
        for module in copy.deepcopy(model).modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert hooks
    assert {hook.__qualname__ for hook in hooks} == {"nullcontext.__exit__"}
    meter.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
