"""Hooks on gradients come and go without a trace, and leave other people's alone."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from noisescale import NoiseMeter
from noisescale.measure.tensor_hooks import forget_hooks, on_output

BATCH = torch.randn(6, 3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def hooks_of(model):
    return [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in model.parameters()]


def train(model, meter, steps):
    for _ in range(steps):
        model.zero_grad()
        model(BATCH).square().mean().backward()
        meter.close_step()


def test_between_measured_steps_no_parameter_calls_into_python():
    model = net()
    meter = NoiseMeter(model, every=10)
    train(model, meter, 2)
    assert meter.steps == 1
    assert hooks_of(model) == [(None, None)] * 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_settled_checks_leave_one_hook_per_parameter():
    model = net()
    meter = NoiseMeter(model)
    train(model, meter, 8)
    assert meter.steps == 8
    assert all(gradient is None and len(after) == 1 for gradient, after in hooks_of(model))


def test_hooks_of_others_survive():
    model, seen = net(), []
    parameter = model[0].weight
    parameter.register_hook(lambda _: seen.append("gradient"))
    parameter.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    meter = NoiseMeter(model, every=2)
    train(model, meter, 4)
    assert meter.steps == 2
    assert seen == ["gradient", "accumulated"] * 4


def test_hooks_on_a_layers_output_all_run():
    seen = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    on_output(y, lambda g: seen.append(("first", float(g.sum()))))
    handle = y.register_hook(lambda g: 10 * g)
    on_output(y, lambda g: seen.append(("second", float(g.sum()))))
    y.register_hook(lambda g: seen.append(("removed", g))).remove()
    y.sum().backward()
    assert seen == [("first", 3.0), ("second", 30.0)]
    assert x.grad.tolist() == [20.0] * 3
    handle.remove()


def test_an_output_without_a_graph_of_its_own_is_hooked_too():
    seen = []
    leaf = torch.ones(3, requires_grad=True)
    on_output(leaf, seen.append)
    leaf.sum().backward()
    assert len(seen) == 1


def test_removed_hooks_are_forgotten_and_new_ones_work():
    parameter, seen = nn.Parameter(torch.ones(2)), []
    parameter.register_hook(seen.append).remove()
    forget_hooks(parameter)
    assert parameter._backward_hooks is None
    handle = parameter.register_hook(seen.append)
    forget_hooks(parameter)
    parameter.sum().backward()
    handle.remove()
    parameter.sum().backward()
    assert len(seen) == 1


def test_a_parameter_that_moves_to_another_type_is_still_measured():
    model = net()
    meter = NoiseMeter(model)
    train(model, meter, 4)
    model.double()
    model.zero_grad()
    model(BATCH.double()).square().mean().backward()
    meter.close_step()
    assert meter.steps == 5


@pytest.mark.parametrize("steps", [0, 1, 2, 8])
def test_a_forgotten_meter_keeps_nothing(steps):
    model = net()
    meter = NoiseMeter(model)
    train(model, meter, steps)
    kept = weakref.ref(model), weakref.ref(meter._source)
    del model, meter
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
