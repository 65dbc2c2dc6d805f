"""Loops that a meter must survive, with the right number or none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from noisescale import InvalidInputError, NoiseMeter
from noisescale.measure.fused import fusible

MODES = ("exact", "fused", "sketch")


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def steps(model, meter, batches):
    for x in batches:
        model.zero_grad()
        model(x).square().mean().backward()
        meter.close_step()


class Standardised(nn.Conv2d):
    """A weight that is changed on its way."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


@pytest.mark.parametrize("mode", MODES)
def test_a_convolution_that_changes_its_weight_trains_as_it_would(mode):
    weights = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Standardised(4, 8, 3, padding=1)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if measured:
            NoiseMeter(model, optimizer, mode=mode, source="examples")
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(6, 4, 16, 16).double()).square().mean().backward()
            optimizer.step()
        weights.append(model[0].weight.detach())
    assert not fusible(model[0])
    assert torch.equal(*weights)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on forward mode
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("when", [0, 2])
def test_transforms_of_torch_func_are_left_alone(mode, when):
    model = layers()
    meter = NoiseMeter(model, mode=mode)
    for k in range(4):
        x = torch.randn(8, 16, 8)
        if k == when:
            values = {name: p.detach() for name, p in model.named_parameters()}

            def loss(values, x=x):
                return torch.func.functional_call(model, values, (x,)).square().mean()

            torch.func.grad(loss)(values)
            torch.func.jvp(loss, (values,), (values,))
        steps(model, meter, [x])
    assert meter.steps == 4
    assert meter.missing == {}


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_ends_one_step_and_not_the_measurement(mode):
    model = layers()
    meter = NoiseMeter(model, mode=mode)
    for size in (4, 4, 0, 4):
        model.zero_grad()
        model(torch.randn(size, 32, 8)).sum().backward()
        meter.close_step()
    assert meter.steps == 3
    assert meter.missing == {}


class Failing(nn.Module):
    on = False

    def forward(self, x):
        if self.on:
            raise ValueError
        return x


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_pass_that_fails_leaves_nothing_behind(mode):
    model = nn.Sequential(nn.Linear(8, 8), Failing(), nn.Linear(8, 8))
    meter = NoiseMeter(model, mode=mode)
    x = torch.randn(4, 16, 8)
    steps(model, meter, [x, x])
    model[1].on = True
    with pytest.raises(ValueError):  # noqa: PT011 - the module's own
        model(x)
    model[1].on = False
    assert all("forward" not in module.__dict__ for module in model.modules())
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.zero_()
    assert other(x).abs().max() == 0
    steps(model, meter, [x])
    assert meter.steps == 3


def test_a_forward_that_was_set_later_stays():
    model = nn.Sequential(nn.Linear(8, 8))
    meter = NoiseMeter(model, mode="fused")
    x = torch.randn(6, 16, 8)
    steps(model, meter, [x, x])
    ordinary = model[0].forward
    model[0].forward = lambda x: 0 * ordinary(x)
    assert model(x).abs().max() == 0
    meter.detach()
    assert model(x).abs().max() == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_late_backward_pass_refuses_its_step(mode):
    model, old = layers(), None
    meter = NoiseMeter(model, mode=mode, source="examples")
    for k in range(5):
        model.zero_grad()
        loss = model(torch.randn(8, 16, 8)).square().mean()
        loss.backward(retain_graph=True)
        if k == 3:
            old.backward()
        old = loss
        meter.close_step()
    assert meter.steps == 4
    assert "earlier step" in meter.estimate().detail


class Late(nn.Module):
    """Its second layer first runs later, with time first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x)
        return self.b(y.transpose(0, 1)).transpose(0, 1) if x.shape[1] == 8 else y


def test_a_layer_that_first_runs_later_is_not_guessed_at():
    model = Late()
    meter = NoiseMeter(model, source="examples")
    steps(model, meter, [torch.randn(8, 16, 8), torch.randn(8, 8, 8)])
    assert "b.weight" in meter.missing


def test_a_weight_may_change_where_autograd_allows_it():
    model = nn.Sequential(nn.Linear(8, 8))
    meter = NoiseMeter(model, mode="fused")
    for _ in range(4):
        model.zero_grad()
        loss = model(torch.randn(4, 16, 8)).square().mean()
        with torch.no_grad():
            model[0].weight.clamp_(-0.1, 0.1)
        loss.backward()
        meter.close_step()
    assert meter.steps == 4


@pytest.mark.parametrize("mode", MODES)
def test_padding_beyond_the_kernel(mode):
    model = nn.Sequential(nn.Conv2d(4, 8, (3, 1), padding=1))
    meter = NoiseMeter(model, mode=mode)
    x = torch.randn(6, 4, 16, 16)
    steps(model, meter, [x, x, x])
    assert (meter.source, meter.steps) == ("examples", 3)


def test_a_meter_s_state_loads_into_another_mode():
    model = layers()
    first = NoiseMeter(model)
    steps(model, first, [torch.randn(8, 16, 8)] * 2)
    state = first.state_dict()
    first.detach()
    meter = NoiseMeter(model, mode="sketch")
    meter.load_state_dict(state)
    steps(model, meter, [torch.randn(8, 16, 8)])
    assert meter.steps == 3
    assert meter.history.trace_cov[:2].tolist() == first.history.trace_cov.tolist()
    assert state["mode"] == "exact"
    said = "steps of modes exact and sketch are averaged together"
    assert said in meter.estimate().detail
    assert said not in first.estimate().detail
    again = NoiseMeter(model, mode="sketch")
    again.load_state_dict(meter.state_dict())
    assert said in again.estimate().detail


def test_a_state_without_modes_loads():
    """As it was written before modes were kept."""
    model = layers()
    meter = NoiseMeter(model)
    steps(model, meter, [torch.randn(8, 16, 8)] * 2)
    state = meter.state_dict()
    del state["mode"], state["modes"]
    meter.load_state_dict(state)
    assert meter.steps == 2


@pytest.mark.parametrize("given", [3, ["0.weight"]])
def test_parameters_that_are_no_function(given):
    with pytest.raises(InvalidInputError, match=r"a function of a parameter's name is required"):
        NoiseMeter(layers(), parameters=given)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("measured", [0, 1])
def test_detaching_early_removes_every_hook(mode, measured):
    """The first steps have hooks of their own, that compare gradients."""
    model = layers()
    meter = NoiseMeter(model, mode=mode)
    steps(model, meter, [torch.randn(8, 16, 8)] * measured)
    meter.detach()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for p in model.parameters():
        assert not p._backward_hooks
        assert not p._post_accumulate_grad_hooks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", [True, False])
def test_a_hook_that_comes_later_and_changes_a_gradient(mode, changes):
    model = layers()
    meter = NoiseMeter(model, mode=mode, source="examples")
    other = NoiseMeter(model, source="examples")
    x = torch.randn(8, 16, 8)
    steps(model, meter, [x, x])
    model[0].weight.register_hook(lambda g: 2 * g if changes else None)
    steps(model, meter, [x, x])
    assert ("0.weight" in meter.missing) == changes
    assert "2.weight" not in meter.missing
    assert not meter._source._checks
    other.detach()


@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_a_backward_pass_that_fails(mode):
    """Its examples are not counted."""
    model, alone = layers(), layers()
    meter = NoiseMeter(model, mode=mode, source="examples")
    reference = NoiseMeter(alone, mode=mode, source="examples")

    def fail(gradient):
        raise RuntimeError("fails")

    for k in range(4):
        torch.manual_seed(k)
        x = torch.randn(8, 16, 8)
        if k == 2:
            model.zero_grad()
            out = model(x)
            out.register_hook(fail)
            with pytest.raises(RuntimeError, match="fails"):
                (100 * out.sum()).backward()
        steps(model, meter, [x])
        steps(alone, reference, [x])
    assert meter.steps == 4
    assert meter.missing == {}
    assert meter.history.grad_sq.tolist() == pytest.approx(reference.history.grad_sq.tolist())
    assert meter.history.trace_cov.tolist() == pytest.approx(reference.history.trace_cov.tolist())


def test_a_backward_pass_that_fails_half_way():
    """Some gradients came and stay."""
    model = layers()
    meter = NoiseMeter(model, source="examples")
    x = torch.randn(8, 16, 8)
    steps(model, meter, [x, x])
    handle = model[1].register_full_backward_hook(lambda *_: 1 / 0)
    model.zero_grad()
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    handle.remove()
    model(x).square().mean().backward()
    meter.close_step()
    assert meter.steps == 2
    steps(model, meter, [x])
    assert meter.steps == 3


def test_complex_parameters_are_left_out_by_name():
    model = layers()
    model.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))
    meter = NoiseMeter(model, source="examples")
    steps(model, meter, [torch.randn(8, 16, 8)] * 2)
    assert meter.missing == {"phase": "it is complex"}
    assert meter.steps == 2
    with pytest.raises(InvalidInputError, match="real numbers is required"):
        NoiseMeter(nn.Linear(2, 2, dtype=torch.complex64))


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return x * self.gain


class InnerTimeFirst(nn.Module):
    """A module within gets time first, as many steps as there are examples."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), Gain()

    def forward(self, x):
        return self.inner(self.first(x).transpose(0, 1)).transpose(0, 1)


def test_time_first_inside_is_not_taken_for_the_batch():
    meter = NoiseMeter(InnerTimeFirst(), source="examples")
    steps(meter.model, meter, [torch.randn(12, 12, 8)] * 2)
    assert list(meter.missing) == ["inner.gain"]
