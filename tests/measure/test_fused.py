"""Mode ``fused``: the same squares, and weight gradients that are the same sums re-ordered."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import noisescale.measure.fused as fused
from noisescale import InvalidInputError, NoiseMeter
from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory, Refused, StepNorms
from per_example import TOLERANCE, cross_entropy, mean_square
from reference import per_example_gradients

FEW = settings(deadline=None, max_examples=25)
DTYPES = st.sampled_from([torch.float64, torch.float32])


@pytest.fixture(autouse=True)
def _always_shifted(monkeypatch):
    """Small convolutions too, which would be unfolded."""
    monkeypatch.setattr("noisescale.measure.rules.parts.LEAST_SHIFTED_ELEMENTS", 1)
    monkeypatch.setattr("noisescale.measure.rules.parts.LEAST_SHIFTED_POSITIONS", 1)


def step(model, loss, batch, mode="fused"):
    """The second measured step (the first one checks the rules) and its gradients."""
    source = ExamplesSource(model, Inventory(model), mode=mode)
    for _ in range(2):
        model.zero_grad()
        source.open()
        loss(model, batch).backward()
        norms = source.close()
    source.detach()
    assert isinstance(norms, StepNorms), norms
    return source, norms, [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def fused_calls(monkeypatch):
    """Count products that were formed in a backward pass of our own."""
    seen = []
    form = fused.total_and_square_sum

    def counted(*args):
        seen.append(args)
        return form(*args)

    monkeypatch.setattr(fused, "total_and_square_sum", counted)
    return seen


def assert_same(model, batch, loss=mean_square, dtype=torch.float64):
    model = model.to(dtype)
    batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)
    truth = per_example_gradients(model, loss, batch)
    _, _, ordinary = step(model, loss, batch, mode="exact")
    source, norms, gradients = step(model, loss, batch)
    assert source.inventory.missing == {}
    for i, (name, rows) in enumerate(truth.items()):
        assert float(norms.weighted[i]) * norms.weighted_factor == pytest.approx(
            float(rows.square().sum()), rel=TOLERANCE[dtype], abs=1e-20
        ), name
    slack = 1e-12 if dtype == torch.float64 else 1e-5
    for ours, theirs in zip(gradients, ordinary, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=slack, atol=slack * float(theirs.norm()))


@FEW
@given(
    shape=st.lists(st.integers(2, 5), min_size=1, max_size=2),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_linear(shape, widths, bias, seed, dtype):
    torch.manual_seed(seed)
    inner, outer = widths
    model = nn.Sequential(nn.Linear(3, inner), nn.Tanh(), nn.Linear(inner, outer, bias=bias))
    assert_same(model, (torch.randn(4, *shape, 3),), dtype=dtype)


@FEW
@given(
    dims=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    groups=st.integers(1, 2),
    bias=st.booleans(),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_convolutions(dims, kernel, stride, dilation, padding, groups, bias, seed, dtype):
    torch.manual_seed(seed)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    layer = conv(
        4,
        2,
        kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        groups=groups,
        bias=bias,
    )
    x = torch.randn(3, 2, *(5, 4, 6)[:dims])
    model = nn.Sequential(conv(2, 4, 1), nn.Tanh(), layer)
    try:
        assume(model(x).numel() > 0)
    except RuntimeError:
        assume(False)  # the kernel is larger than the input
    assert_same(model, (x,), dtype=dtype)


class Tied(nn.Module):
    """An embedding that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.tokens(ids))))


def test_tied_weights_keep_their_cross_terms(monkeypatch):
    seen = fused_calls(monkeypatch)
    torch.manual_seed(0)
    ids = torch.randint(0, 7, (4, 6))
    assert_same(Tied(), (ids, ids), loss=cross_entropy)
    assert len(seen) == 2, "mix and head"


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    torch.manual_seed(0)
    assert_same(Twice(), (torch.randn(3, 5, 4),))


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(2))


def test_it_runs_fused_on_measured_steps_only(monkeypatch):
    seen = fused_calls(monkeypatch)
    model, x = small(), torch.randn(4, 2, 5, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = NoiseMeter(model, optimizer, mode="fused", every=3)
    counts = []
    for _ in range(7):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        counts.append(len(seen))
        optimizer.step()
    assert counts == [0, 0, 0, 1, 1, 1, 2], "the first measured step checks the rule"
    meter.detach()
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("mode", ["exact", "fused", "sketch"])
def test_a_copy_of_the_model_is_a_model_of_its_own(mode):
    """Copies (averaged weights, target networks) made at any time, trained beside the original."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    traces, copies = [], []
    for with_copy in (False, True):
        meter = NoiseMeter(model, mode=mode)
        for _ in range(4):
            if with_copy:
                copies = [copy.deepcopy(model)]
                with torch.no_grad():
                    copies[0][0].weight.zero_()
                    copies[0][0].bias.zero_()
                own = copies[0](x).detach()
                assert torch.equal(own, own[:1, :1].expand_as(own)), "its own weights"
            model.zero_grad()
            model(x).square().mean().backward()
            for other in copies:
                other(x).square().mean().backward()
            meter.close_step()
        traces.append(meter.history.trace_cov.tolist())
        meter.detach()
    assert traces[0] == traces[1]


def test_training_is_the_same_up_to_rounding():
    weights = []
    for mode in ("exact", "fused"):
        model, x = small().double(), torch.randn(4, 2, 5, 5, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        NoiseMeter(model, optimizer, mode=mode)
        for _ in range(10):
            optimizer.zero_grad()
            model(
                torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
            ).square().mean().backward()
            optimizer.step()
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-13)


def test_a_gradient_that_is_differentiated_again_stays_right():
    """A gradient penalty: the ordinary gradient is used, and nothing is measured wrong."""
    grads = []
    for mode in ("exact", "fused"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        x = torch.randn(5, 6, 3, dtype=torch.float64)
        source = ExamplesSource(model, Inventory(model), mode=mode)
        for again in (False, True):
            model.zero_grad()
            source.open()
            loss = mean_square(model, (x,))
            if again:
                first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
                loss = loss + sum(g.square().sum() for g in first)
            loss.backward()
            result = source.close()
        source.detach()
        assert isinstance(result, Refused) or "0.weight" in source.inventory.missing
        grads.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parts(frozen):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    getattr(model[2], frozen).requires_grad_(False)
    model = model.double()
    batch = (torch.randn(5, 6, 3).double(),)
    _, ordinary, _ = step(model, mean_square, batch, mode="exact")
    _, norms, _ = step(model, mean_square, batch)
    torch.testing.assert_close(norms.weighted, ordinary.weighted)


def test_under_autocast_layers_run_their_ordinary_way(monkeypatch):
    seen = fused_calls(monkeypatch)
    model, x = nn.Linear(3, 4), torch.randn(5, 6, 3)

    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.mse_loss(model(batch[0]).float(), torch.zeros(5, 6, 4))

    step(model, loss, (x,))
    assert seen == []


def test_a_mode_that_does_not_exist():
    with pytest.raises(InvalidInputError, match=r"mode 'fast'.*exact"):
        NoiseMeter(nn.Linear(2, 2), mode="fast")
