"""A model that changed after the meter was attached is refused by name."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from noisescale import InvalidInputError, NoiseMeter
from noisescale.measure.attached import Attached
from watched import Body, batch_of, layers, linear, loss


def replace_layer(model):
    model.m = linear().double()


def replace_parameter(model):
    model.m[0].weight = nn.Parameter(model.m[0].weight.detach().clone())


def freeze(model):
    model.first.weight.requires_grad_(False)


def unfreeze(model):
    model.frozen.requires_grad_(True)


def add_layer(model):
    model.extra = linear()


def add_parameter(model):
    model.first.register_parameter("scale", nn.Parameter(torch.ones(1)))


def tie(model):
    model.m[2].weight = model.m[0].weight


def remove(model):
    del model.frozen


def parametrize(model):
    nn.utils.parametrizations.weight_norm(model.m[0])


CHANGES = {
    replace_layer: "module 'm' was replaced",
    replace_parameter: "parameter 'm.0.weight' was replaced",
    freeze: "parameter 'first.weight' was frozen",
    unfreeze: "parameter 'frozen' was unfrozen",
    add_layer: "module 'extra' was added",
    add_parameter: "parameter 'first.scale' was added",
    tie: "parameter 'm.2.weight' was replaced",
    remove: "parameter 'frozen' was removed",
    parametrize: "module 'm.0.parametrizations' was added",
}


def changing_model():
    model = Body(m=layers()).double()
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    return model


@pytest.mark.parametrize("source", ["examples", "microbatches"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_refused_by_name(change, source):
    model = changing_model()
    x, y = batch_of()

    def step():
        model.zero_grad()
        for part in zip(x.chunk(2), y.chunk(2), strict=True):
            (loss(model, part) / 2).backward()
        meter.close_step()

    meter = NoiseMeter(model, source=source)
    step()
    change(model)
    step()
    assert meter.steps == 1
    detail = meter.estimate().detail
    assert CHANGES[change] in detail
    assert "make a new NoiseMeter" in detail
    meter.detach()
    meter = NoiseMeter(model, source=source)
    step()
    assert meter.steps == 1
    meter.detach()


def test_a_conversion_that_keeps_the_parameters_is_none():
    model = changing_model()
    attached = Attached(model)
    model.float().train().zero_grad()
    model.load_state_dict(model.state_dict())
    model.m.to(memory_format=torch.preserve_format)
    assert attached.change() == ""


def test_looking_for_changes_is_cheap():
    """Below 1 microsecond per parameter, the best of a few tries."""
    model = nn.Sequential(*(linear() for _ in range(200)))
    attached = Attached(model)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        assert not attached.change()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) / 400 < 1e-6


def test_a_lazy_model_wants_one_call_first():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(InvalidInputError, match="of a lazy module"):
        NoiseMeter(model)
    model(torch.randn(4, 2))
    NoiseMeter(model).detach()
