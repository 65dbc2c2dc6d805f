"""The noise scale under an optimizer's norm, against a slow loop over examples."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noisescale import InvalidInputError, NoiseMeter, NoiseScale, Outcome
from noisescale.measure.gradients import Inventory
from noisescale.measure.norm_layers import norm_layers
from noisescale.measure.preconditioned import AdamMetric, AdamNorm
from noisescale.measure.second_moments import LEAST_STEPS
from per_example import TOLERANCE
from reference import flat, per_example_gradients, sample_moments
from tied_models import TiedHead

ALL = AdamNorm(at_most=None)
FEW = settings(max_examples=12, deadline=None, derandomize=True)
EARLY = f"fewer than {LEAST_STEPS} updates"


class Net(nn.Module):
    """Table, convolution, normalisation, linear layers."""

    def __init__(self, tied=False):
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        h = self.table(ids)
        return self.head(self.norm(torch.tanh(self.conv(h.mT).mT) + h).mean(1))


def loss(model, batch):
    out = model(batch[0])
    return F.cross_entropy(out.flatten(0, -2), batch[1].flatten())


def batches(steps, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 7, (size, 5), generator=generator)
        yield ids, ids[:, 0]


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.9, 0.97), eps=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3, eps=1e-3),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-3, eps=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, eps=1e-3),
    "centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, eps=1e-3),
}


def divisor(optimizer, parameter):
    """What the optimizer's last step divided by, written out once more."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    state = optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.RMSprop):
        v = state["square_avg"].double()
        if group["centered"]:
            v = v - state["grad_avg"].double() ** 2
        return v.sqrt() + group["eps"]
    t = float(state["step"])
    v = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"].double()
    correction = 1 - group["betas"][1] ** t
    if isinstance(optimizer, torch.optim.RAdam):
        return (v.sqrt() + group["eps"]) / correction**0.5
    return (v / correction).sqrt() + group["eps"]


def scaled(model, optimizer, batch, power=2, of=loss):
    """Per-example gradients divided by the optimizer's divisor: (examples, parameters)."""
    gradients = per_example_gradients(model, of, batch)
    named = dict(model.named_parameters())
    weights = {n: divisor(optimizer, named[n]) for n in gradients}
    live = {
        n: w * (torch.where(optimizer_v(optimizer, named[n]) > 0, 1.0, torch.inf))
        for n, w in weights.items()
    }
    return flat({n: g / live[n] ** (power / 2) for n, g in gradients.items()})


def optimizer_v(optimizer, parameter):
    state = optimizer.state[parameter]
    return state["exp_avg_sq"] if "exp_avg_sq" in state else state["square_avg"]


def step(model, optimizer, batch, pieces=1):
    model.zero_grad()
    for part in zip(*(t.chunk(pieces) for t in batch), strict=True):
        (loss(model, part) / pieces).backward()
    optimizer.step()


def warmed(optimizer="adam", dtype=torch.float64, tied=False, model=None):
    torch.manual_seed(0)
    model = (Net(tied) if model is None else model).to(dtype)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    for batch in batches(LEAST_STEPS, seed=5):
        step(model, optimizer, batch)
    return model, optimizer


def assert_history(meter, expected, rel):
    history = meter.history
    grad_sq, trace = zip(*expected, strict=True)
    size = np.abs(trace).max()
    np.testing.assert_allclose(history.trace_cov, trace, rtol=rel)
    np.testing.assert_allclose(history.grad_sq, grad_sq, rtol=rel, atol=rel * size)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_are_those_of_the_divided_gradients(optimizer, tied, power):
    model, optimizer = warmed(optimizer, tied=tied)
    norm = AdamNorm(power=power, at_most=None)
    meter = NoiseMeter(model, optimizer, source="examples", preconditioner=norm)
    expected = []
    for batch in batches(4):
        expected.append(sample_moments(scaled(model, optimizer, batch, power)))
        step(model, optimizer, batch)
    assert_history(meter, expected, 1e-9)


@FEW
@given(
    vocabulary=st.integers(3, 12),
    width=st.integers(2, 8),
    length=st.integers(1, 6),
    twice=st.booleans(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_tied_heads(vocabulary, width, length, twice, seed, dtype):
    torch.manual_seed(seed)
    model = TiedHead(vocabulary, width, twice=twice).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3)
    meter = NoiseMeter(model, optimizer, source="examples", preconditioner=ALL)
    for number in range(LEAST_STEPS + 1):
        ids = torch.randint(0, vocabulary, (6, length + 1))
        batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if number == LEAST_STEPS:
            expected = [sample_moments(scaled(model, optimizer, batch))]
        step(model, optimizer, batch)
    assert_history(meter, expected, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("way", ["accumulated", "split"])
@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulated_microbatches_and_split_passes(pieces, way):
    expected = []
    model, optimizer = warmed()
    for batch in batches(4):
        rows = scaled(model, optimizer, batch)
        units = rows.reshape(pieces, -1, rows.shape[1]).mean(1)
        grad_sq, trace = sample_moments(units)
        expected.append((grad_sq, trace * len(rows) / pieces))
        step(model, optimizer, batch, pieces)
    model, optimizer = warmed()
    meter = NoiseMeter(model, optimizer, source="microbatches", preconditioner="adam")
    for batch in batches(4):
        if way == "split":
            meter.split_pass(loss, batch, micro_batch_size=len(batch[0]) // pieces)
        step(model, optimizer, batch, pieces)
    assert_history(meter, expected, 1e-9)
    assert meter.estimate().preconditioner == "adam"


def test_groups_have_their_own_options():
    torch.manual_seed(0)
    model = Net().double()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    optimizer = torch.optim.Adam(
        [{"params": weights, "betas": (0.5, 0.9), "eps": 0.1}, {"params": biases, "eps": 1e-2}]
    )
    for batch in batches(LEAST_STEPS, seed=5):
        step(model, optimizer, batch)
    meter = NoiseMeter(model, optimizer, preconditioner=ALL)
    batch = next(batches(1))
    expected = sample_moments(scaled(model, optimizer, batch))
    step(model, optimizer, batch)
    assert_history(meter, [expected], 1e-9)


@pytest.mark.parametrize("foreach", [False, True])
def test_counts_may_be_tensors(foreach):
    model, optimizer = warmed()
    other = torch.optim.Adam(model.parameters(), foreach=foreach, fused=not foreach)
    state = optimizer.state_dict()
    other.load_state_dict(state)
    meter = NoiseMeter(model, other, preconditioner=ALL)
    batch = next(batches(1))
    expected = sample_moments(scaled(model, other, batch))
    step(model, other, batch)
    assert_history(meter, [expected], 1e-9)


def test_the_first_steps_have_no_second_moments():
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    meter = NoiseMeter(model, optimizer, preconditioner="adam")
    stream = batches(LEAST_STEPS + 30)
    step(model, optimizer, next(stream))
    first = meter.estimate()
    assert first.outcome == Outcome.UNSUPPORTED
    assert "has no second moments yet" in first.detail
    for batch in stream:
        step(model, optimizer, batch)
    found = meter.estimate()
    assert meter.steps == 30
    assert f"{LEAST_STEPS} steps could not be measured" in found.detail
    assert EARLY in found.detail
    assert NoiseScale.from_json(found.to_json()) == found


def test_parameters_that_the_optimizer_does_not_hold():
    model = Net()
    optimizer = torch.optim.Adam(model.head.parameters())
    meter = NoiseMeter(model, optimizer, preconditioner="adam")
    only = NoiseMeter(
        model, optimizer, preconditioner="adam", parameters=lambda n: n.startswith("head")
    )
    for batch in batches(LEAST_STEPS + 3):
        step(model, optimizer, batch)
    assert meter.steps == 0
    assert "the optimizer does not hold" in meter.estimate().detail
    assert only.steps == 3


def test_a_parameter_without_gradient_does_not_matter():
    model = Net()
    model.spare = nn.Linear(3, 3)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    meter = NoiseMeter(model, optimizer, source="examples", preconditioner="adam")
    for batch in batches(LEAST_STEPS + 3):
        step(model, optimizer, batch)
    assert meter.steps == 3


def test_a_coordinate_that_never_had_a_gradient_counts_for_nothing():
    torch.manual_seed(0)
    model = Net().double()
    optimizer = torch.optim.Adam(model.parameters())
    for ids, target in batches(LEAST_STEPS):
        step(model, optimizer, (ids.clamp_max(5), target.clamp_max(5)))
    meter = NoiseMeter(model, optimizer, preconditioner=ALL)
    batch = next(batches(1))
    assert 6 in batch[0]
    expected = sample_moments(scaled(model, optimizer, batch))
    step(model, optimizer, batch)
    assert_history(meter, [expected], 1e-9)
    total = sum(p.numel() for p in model.parameters())
    said = f"6 of {total} coordinates have v = 0 (no gradient yet) and count for nothing"
    assert f"{said}: table.weight 6" in meter.estimate().detail
    step(model, optimizer, batch)
    assert "v = 0" not in meter.estimate().detail


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_rescaling_gradients_with_their_second_moments_changes_nothing(scale):
    """Adam's step does not change then, nor does the noise scale of its norm (eps = 0)."""

    class Rescaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.inner, self.factor = nn.Linear(4, 3), factor

        def forward(self, x):
            # Values as they are; gradients times the factor.
            w, b = (
                p * f - (p * (f - 1)).detach()
                for p, f in zip((self.inner.weight, self.inner.bias), self.factor, strict=True)
            )
            return F.linear(x, w, b)

    found = []
    for factor in ((1.0, 1.0), (scale, 1 / scale)):
        torch.manual_seed(0)
        model = Rescaled(factor).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=0)
        meter = NoiseMeter(model, optimizer, preconditioner="adam", source="microbatches")
        generator = torch.Generator().manual_seed(1)
        for _ in range(40):
            x = torch.randn(16, 4, generator=generator).double()
            optimizer.zero_grad()
            for part in x.chunk(8):
                ((model(part) - part[:, :3]).square().mean() / 8).backward()
            optimizer.step()
        found.append(meter.estimate())
    assert found[1].b_simple == pytest.approx(found[0].b_simple, rel=1e-6)
    assert found[1].grad_sq == pytest.approx(found[0].grad_sq, rel=1e-6)


class Known(nn.Module):
    """Loss w.x of x ~ N(G, diag c): the gradient of an example is x itself."""

    def __init__(self, dimension):
        super().__init__()
        self.line = nn.Linear(dimension, 1, bias=False)

    def forward(self, x):
        return self.line(x)


@pytest.mark.parametrize("at_most", [None, 4])
def test_moments_are_unbiased_where_they_are_known(at_most):
    """At v held fixed, against |G|_P^2 and tr(P Sigma P) in closed form; z below 4."""
    torch.manual_seed(0)
    dimension, size, repeats = 12, 16, 1500
    mean = torch.linspace(0.2, 1.0, dimension).double()
    sd = torch.linspace(3.0, 0.5, dimension).double()
    model = Known(dimension).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 1 - 1e-12))
    generator = torch.Generator().manual_seed(0)
    state = optimizer.state[model.line.weight]
    state["step"] = torch.tensor(1e9)
    state["exp_avg"] = torch.zeros(1, dimension).double()
    state["exp_avg_sq"] = torch.linspace(0.1, 4.0, dimension).double().view(1, -1)
    weight = divisor(optimizer, model.line.weight).view(-1) ** -2
    meter = NoiseMeter(model, optimizer, preconditioner=AdamNorm(at_most=at_most))
    for _ in range(repeats):
        x = mean + sd * torch.randn(size, dimension, generator=generator).double()
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
    for values, truth in (
        (meter.history.grad_sq, float((weight * mean**2).sum())),
        (meter.history.trace_cov, float((weight * sd**2).sum())),
    ):
        error = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - truth) < 4 * error
        assert error < 0.1 * truth
    assert ("drawn at random" in meter.estimate().detail) == (at_most is not None)


@pytest.mark.parametrize(("new", "rel"), [(1, 0.05), (16, 0.05), (64, 0.25)])
def test_second_moments_restated_at_another_batch_size(new, rel):
    """With a long memory v' is G^2 + sigma^2/B', so the noise scale is that under known weights."""
    torch.manual_seed(0)
    dimension, size = 4, 16
    mean = torch.tensor([1.0, 0.5, 2.0, 1.5]).double()
    sd = torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    model = Known(dimension).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.9995), eps=1e-12)
    norm = AdamNorm(batch_size=new, at_most=None)
    meter = NoiseMeter(model, optimizer, preconditioner=norm)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        x = mean + sd * torch.randn(size, dimension, generator=generator).double()
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
    weight = 1 / (mean**2 + sd**2 / new)
    truth = float((weight * sd**2).sum() / (weight * mean**2).sum())
    found = meter.estimate(first=1000)
    assert found.b_simple == pytest.approx(truth, rel=rel)
    assert found.preconditioner == f"adam, v at batch size {new}"
    assert ("floor" in found.detail) == (new > size)


def test_what_restating_needs():
    model, optimizer = warmed("amsgrad")
    meter = NoiseMeter(model, optimizer, preconditioner=AdamNorm(batch_size=64))
    for batch in batches(2):
        step(model, optimizer, batch)
    assert "no plain average" in meter.estimate().detail
    model, optimizer = warmed()
    meter = NoiseMeter(
        model, optimizer, source="microbatches", preconditioner=AdamNorm(batch_size=64)
    )
    for batch in batches(2):
        step(model, optimizer, batch, 2)
    assert "source='examples'" in meter.estimate().detail
    with pytest.raises(InvalidInputError, match="a mean loss is required"):
        NoiseMeter(model, optimizer, loss_reduction="sum", preconditioner=AdamNorm(batch_size=64))


@pytest.mark.parametrize("norm", ["adam", AdamNorm(batch_size=32, at_most=4)])
@pytest.mark.parametrize(("source", "pieces"), [("examples", 1), ("microbatches", 2)])
def test_training_is_bit_identical(source, pieces, norm):
    def weights(watch):
        torch.manual_seed(0)
        model = Net()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        options = {"source": source, "preconditioner": norm}
        meter = NoiseMeter(model, optimizer, **options) if watch else None
        for batch in batches(LEAST_STEPS + 10):
            step(model, optimizer, batch, pieces)
        assert meter is None or isinstance(norm, AdamNorm) or meter.steps == 10
        return [*model.state_dict().values(), torch.rand(4)]

    assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False), strict=True))


def test_resumed_exactly():
    def run(interrupted):
        model, optimizer = warmed()
        norm = AdamNorm(at_most=3)
        meter = NoiseMeter(model, optimizer, preconditioner=norm)
        for number, batch in enumerate(batches(8)):
            step(model, optimizer, batch)
            if interrupted and number == 3:
                file = io.BytesIO()
                torch.save(meter.state_dict(), file)
                meter.detach()
                meter = NoiseMeter(model, optimizer, preconditioner=norm)
                file.seek(0)
                meter.load_state_dict(torch.load(file, weights_only=True))
        return meter

    whole, resumed = run(False), run(True)
    np.testing.assert_array_equal(whole.history.trace_cov, resumed.history.trace_cov)
    plain = NoiseMeter(resumed.model)
    with pytest.raises(InvalidInputError, match="preconditioner='adam'"):
        plain.load_state_dict(resumed.state_dict())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preconditioner": "adma"}, "did you mean adam"),
        ({"preconditioner": "adam"}, "Adam, AdamW, NAdam, RAdam or RMSprop is required"),
        ({"parameters": lambda name: False}, "some trainable parameter"),
    ],
)
def test_bad_arguments(arguments, words):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match=words):
        NoiseMeter(model, optimizer, **arguments)
    for norm in ({"power": 3}, {"batch_size": 0}, {"at_most": 0}):
        with pytest.raises(InvalidInputError, match="required"):
            AdamNorm(**norm)
    with pytest.raises(InvalidInputError, match="optimizer none"):
        NoiseMeter(model, preconditioner="adam")


def test_weights_are_forgotten_between_steps():
    """The second moments are those before the step's own update, read when gradients come."""
    model, optimizer = warmed()
    inventory = Inventory(model)
    metric = AdamMetric(optimizer, inventory, ALL)
    gradient = torch.ones_like(inventory.slots[0].tensor)
    metric.freeze()
    before = metric.square(0, gradient)
    optimizer.state[inventory.slots[0].tensor]["exp_avg_sq"].mul_(4)
    assert torch.equal(metric.square(0, gradient), before)
    metric.freeze()
    assert metric.square(0, gradient) < before


def test_only_the_norm_layers():
    model, optimizer = warmed(dtype=torch.float32)
    only = NoiseMeter(model, optimizer, parameters=norm_layers(model))
    every = NoiseMeter(model, optimizer, groups=lambda n: n.partition(".")[0])
    for batch in batches(20):
        step(model, optimizer, batch)
    found, reference = only.estimate(), every.estimate_groups()["norm"]
    assert found.parameters_seen.seen == 12
    assert found.parameters_seen.total == sum(p.numel() for p in model.parameters())
    assert "2 of 7 parameters were asked for" in found.detail
    assert found.b_simple == reference.b_simple
    assert found.grad_sq == pytest.approx(reference.grad_sq)
    assert only.source == "examples"
    assert only.missing == {}
    hooked = [m for m in model.modules() if m._forward_hooks]
    every.detach()
    hooked = [m for m in model.modules() if m._forward_hooks]
    assert hooked == [model, model.norm]
    with pytest.raises(InvalidInputError, match="LayerNorm"):
        norm_layers(nn.Linear(2, 2))
