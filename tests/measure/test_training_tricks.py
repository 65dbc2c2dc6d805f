"""What loops do to a model beside calling it: right numbers, or a refusal that says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from noisescale import NoiseMeter
from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory, Refused, StepNorms
from reference import flat, gradient, per_example_gradients, sample_moments
from watched import WIDTH, Body, batch_of, check, layers, linear, loss, watch


def images(n=8):
    torch.manual_seed(1)
    return torch.randn(n, 2, 6, 6).double(), torch.randint(0, 3, (n,))


def convolutions(inplace):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=inplace),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


# Memory layout, in-place operations


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("what", ["input", "model", "both"])
def test_channels_last(what, inplace):
    model, (x, y) = convolutions(inplace), images()
    if what != "input":
        model = model.to(memory_format=torch.channels_last)
    if what != "model":
        x = x.contiguous(memory_format=torch.channels_last)
    assert check(model, batch=(x, y)) == {}


def test_channels_last_in_three_dimensions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    x = torch.randn(4, 2, 3, 3, 3).double().contiguous(memory_format=torch.channels_last_3d)
    batch = x, torch.randint(0, 3, (4,))
    assert check(model.to(memory_format=torch.channels_last_3d), batch=batch) == {}


@pytest.mark.parametrize(
    "inside",
    [
        lambda s, h: s.m(h.t().contiguous().t()),
        lambda s, h: s.m(torch.cat([h, h], 1)[:, ::2]),
        lambda s, h: s.m(h.unsqueeze(1).expand(-1, 3, -1)).mean(1),
        lambda s, h: s.m(h.flip(0).flip(0)),
    ],
    ids=["transposed", "strided", "expanded", "flipped"],
)
def test_inputs_that_are_not_contiguous(inside):
    assert check(Body(inside, m=layers())) == {}


def overwritten_view(s, h):
    out = s.m(h)
    out[:, 0] = 0
    out[:, 1:3].mul_(3)
    return out


@pytest.mark.parametrize(
    "inside",
    [
        lambda s, h: s.m(h).relu_(),
        lambda s, h: s.m(h).add_(h),
        lambda s, h: h.clone().add_(s.m(h)),
        lambda s, h: s.m(h).add_(h).mul_(2).relu_(),
        overwritten_view,
    ],
    ids=["activation", "residual", "into the input", "chain", "view"],
)
def test_outputs_changed_in_place(inside):
    norm = nn.Sequential(nn.LayerNorm(WIDTH), nn.ReLU(inplace=True), linear())
    assert check(Body(inside, m=nn.Sequential(norm, nn.ReLU(inplace=True), linear()))) == {}


def test_an_input_changed_in_place_is_left_out():
    """At any step, first or later; autograd itself does not need this one."""

    def inside(s, h):
        h = h * 1
        out = s.m(h)
        if s.changes:
            h.add_(1)
        return out

    def changing(model, batch):
        model.changes = True
        return loss(model, batch)

    for step in (changing, [loss] * 4 + [changing]):
        model = Body(inside, m=linear())
        model.m.weight.requires_grad_(False)
        model.changes = False
        source, _ = watch(model, step)
        assert "in place" in source.inventory.missing["m.bias"]


# Passes


@pytest.mark.parametrize("sizes", [[4, 4], [2, 2, 2, 2], [1, 3, 4]])
def test_accumulation(sizes):
    """Parts weighted by their size add up to the mean over the batch."""
    model = Body(m=layers()).double()
    source = ExamplesSource(model, Inventory(model), loss_reduction="sum")
    source.open()
    x, y = batch_of()
    for part in zip(x.split(sizes), y.split(sizes), strict=True):
        (loss(model, part) * len(part[0])).backward()
    norms = source.close()
    rows = flat(per_example_gradients(model, loss, (x, y)))
    assert isinstance(norms, StepNorms)
    assert (norms.units, norms.examples) == (8, 8)
    assert float(norms.weighted.sum()) == pytest.approx(float(rows.square().sum()))
    assert float(norms.mean.sum()) / 64 == pytest.approx(float(rows.mean(0).square().sum()))


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = linear(), linear()
            self.one, self.two = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1)

        def forward(self, x, *, extra):
            h = torch.tanh(self.a(x)) + torch.tanh(self.b(extra["z"]))
            return {"classes": self.one(h), "value": (self.two(h), h)}

    def both(model, batch):
        out = model(batch[0], extra={"z": batch[1]})
        value = (out["value"][0].squeeze(1) - 1).square().mean()
        return F.cross_entropy(out["classes"], batch[2]) + value

    torch.manual_seed(1)
    batch = torch.randn(8, WIDTH).double(), torch.randn(8, WIDTH).double(), torch.arange(8) % 3
    assert check(Two(), both, batch, truth=both) == {}

    def apart(model, batch):
        """Each output's loss by itself: the trunk is differentiated twice."""
        out = model(batch[0], extra={"z": batch[1]})
        F.cross_entropy(out["classes"], batch[2]).backward(retain_graph=True)
        out["value"][0].square().mean().backward()

    source, _ = watch(Two(), [both] * 4 + [apart], batch)
    assert set(source.inventory.missing) == {f"{m}.{p}" for m in "ab" for p in ("weight", "bias")}


def test_tokens_with_weights():
    """Under sum over tokens / constant, an example is a sequence with the weights it has."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(5, WIDTH), nn.Linear(WIDTH, 5)

        def forward(self, ids):
            return self.head(torch.tanh(self.table(ids)))

    torch.manual_seed(1)
    ids, weights = torch.randint(0, 5, (8, 7)), torch.rand(5).double()
    targets = torch.where(torch.rand(8, 7) < 0.4, -100, ids.roll(-1, 1))

    def weighted(model, batch):
        logits = model(batch[0]).transpose(1, 2)
        total = F.cross_entropy(
            logits, batch[1], weight=weights, ignore_index=-100, reduction="sum"
        )
        return total / 20 / len(batch[0])

    assert check(Tokens(), weighted, (ids, targets), truth=weighted) == {}

    def averaged(model, batch):
        """The mean over the tokens that count: the same up to one constant per step."""
        return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], ignore_index=-100)

    _, norms = watch(Tokens(), averaged, (ids, targets))
    count = int((targets >= 0).sum())

    def share(model, batch):
        logits = model(batch[0]).transpose(1, 2)
        return F.cross_entropy(logits, batch[1], ignore_index=-100, reduction="sum") * 8 / count

    rows = flat(per_example_gradients(Tokens(), share, (ids, targets)))
    assert float(norms.weighted.sum()) * norms.weighted_factor == pytest.approx(
        float(rows.square().sum())
    )


def adversarial(by):
    """An input made worse by a pass of its own, in train mode, then the training pass."""

    def step(model, batch):
        x = batch[0].clone().requires_grad_()
        if by == "grad":
            torch.autograd.grad(loss(model, (x, batch[1])), x)
        else:
            loss(model, (x, batch[1])).backward(inputs=[x])
        return loss(model, batch)

    return step


@pytest.mark.parametrize("by", ["grad", "inputs"])
@pytest.mark.parametrize("first", [True, False])
def test_a_pass_to_the_inputs_alone_does_not_count(by, first):
    step = adversarial(by) if first else [loss] * 4 + [adversarial(by)]
    assert check(Body(m=layers()), step) == {}


def test_a_pass_through_a_model_frozen_for_it_does_not_count():
    """As a generator's step runs through its discriminator."""

    def step(model, batch):
        model.requires_grad_(False)
        loss(model, (batch[0].clone().requires_grad_(), batch[1])).backward()
        model.requires_grad_(True)
        return loss(model, batch)

    assert check(Body(m=layers()), [loss] * 4 + [step]) == {}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_zeroed_inside_a_step_start_it_again(set_to_none):
    """As a discriminator's, after the generator's step went through it."""

    def step(model, batch):
        loss(model, (batch[0] * 2, batch[1])).backward()
        model.zero_grad(set_to_none=set_to_none)
        return loss(model, batch)

    model = Body(m=layers())
    assert check(model, [loss] * 4 + [step]) == {}


def test_gradients_clipped_between_two_passes_are_refused():
    def step(model, batch):
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return loss(model, batch)

    source, result = watch(Body(m=layers()), [loss] * 4 + [step])
    assert isinstance(result, Refused)
    assert "between two backward passes" in result.detail
    assert source.inventory.missing == {}


def penalty(model, batch):
    x = batch[0].clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    return F.cross_entropy(out, batch[1]) + slope.square().sum(1).mean()


def weight_penalty(model, batch):
    value = loss(model, batch)
    slopes = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
    return value + sum(s.square().sum() for s in slopes)


def create_graph(model, batch):
    value = loss(model, batch)
    value.backward(create_graph=True)
    for p in model.parameters():
        p.grad = p.grad.detach()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("step", [penalty, weight_penalty, create_graph])
def test_gradients_of_gradients_are_refused(step, activation):
    """Every time, and only the steps that hold them."""
    model = Body(m=layers(activation()))
    for steps in ([step], [loss] * 4 + [step]):
        source, result = watch(model, steps)
        assert isinstance(result, Refused)
        assert "create_graph=True" in result.detail
        assert source.inventory.missing == {}


def test_the_same_graph_differentiated_twice_is_refused():
    def twice(model, batch):
        value = loss(model, batch)
        value.backward(retain_graph=True)
        return value

    source, result = watch(Body(m=layers()), [loss] * 4 + [twice])
    assert isinstance(result, Refused)
    assert all("twice" in reason for reason in source.inventory.missing.values())


@pytest.mark.parametrize("kind", [adversarial("grad"), adversarial("inputs"), penalty])
def test_microbatches_count_the_passes_that_reach_parameters(kind):
    """A penalty on gradients is a part of every micro-batch's loss."""
    model = Body(m=layers()).double()
    x, y = batch_of()
    parts = list(zip(x.chunk(4), y.chunk(4), strict=True))
    meter = NoiseMeter(model, source="microbatches")
    for part in parts:
        (kind(model, part) / 4).backward()
    meter.close_step()
    meter.detach()
    rows = [gradient(model, kind, part) for part in parts]
    means = torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows])
    grad_sq, trace = sample_moments(means)
    assert meter.history.trace_cov.item() == pytest.approx(2 * trace)
    assert meter.history.grad_sq.item() == pytest.approx(grad_sq)


# What no measurement can see by itself


def contrastive(model, batch):
    h = F.normalize(model(batch[0]), dim=1)
    other = F.normalize(model(batch[0].flip(1)), dim=1)
    return F.cross_entropy(h @ other.t() / 0.1, torch.arange(len(h)))


def test_check_finds_losses_and_layers_that_mix_examples():
    model = Body(m=layers()).double()
    with NoiseMeter(model) as meter:
        assert meter.check(batch_of(), loss).agrees
        mixed = meter.check(batch_of(), contrastive)
    assert not mixed.agrees
    assert "mixes the examples" in mixed.detail
    mixing = Body(m=nn.Sequential(linear(), nn.BatchNorm1d(WIDTH))).double()
    with NoiseMeter(mixing, source="examples") as meter:
        found = meter.check(batch_of(), loss)
    assert not found.agrees
    assert "BatchNorm 'm.1'" in found.detail


def test_a_functional_model_is_named():
    """Hooks of layers that are never called do not fire: their parameters are left out."""

    class Functional(Body):
        def forward(self, x):
            h = torch.tanh(F.linear(x, self.first.weight, self.first.bias))
            return self.head(h)

    model = Functional().double()
    source, _ = watch(model, loss)
    assert set(source.inventory.missing) == {"first.weight", "first.bias"}
    assert set(gradient(model, loss, batch_of())) == {
        *source.inventory.missing,
        "head.weight",
        "head.bias",
    }
