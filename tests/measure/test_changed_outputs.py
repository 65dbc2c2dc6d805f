"""Outputs of layers that later operations change in place, views among them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from noisescale import NoiseMeter
from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory, StepNorms
from watched import WIDTH, Body, batch_of, check, linear, loss, watch

LENGTH = 5


def sequences(n=8):
    return batch_of(n, LENGTH, WIDTH)


def sliced(out):
    out[:, 0] = 0
    out[..., 1:3].mul_(3)
    return out


def transposed(out):
    out.transpose(0, 1).relu_()
    return out


def under_other_views(out):
    out.unflatten(-1, (2, -1)).transpose(-2, -1).mul_(2).sigmoid_()
    return out


def unrecorded(out):
    """As gradients see it, nothing happened."""
    with torch.no_grad():
        out.add_(1)
    return out


CHANGES = {
    "activation": torch.relu_,
    "sum": lambda out: out.add_(1).mul_(out.detach().cos()),
    "itself": lambda out: out.mul_(out.detach() + 1),
    "masked": lambda out: out.masked_fill_(out.detach() > 0.5, 0),
    "slices": sliced,
    "transposed": transposed,
    "other views": under_other_views,
    "without gradients": unrecorded,
    "not at all": lambda out: out,
}


def frozen(key):
    layer = linear()
    getattr(layer, key).requires_grad_(False)
    return layer


class Rows(nn.Module):
    """A module without a rule whose output is a view: run again."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, WIDTH), self.weight).view(x.shape)


class Normalised(nn.Module):
    """InstanceNorm over the positions, whose output is a view."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(LENGTH, affine=True)

    def forward(self, x):
        return self.norm(x)


class Attended(nn.Module):
    """Two outputs, the first a transposed view."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.mix = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, x):
        y = x if self.mix.batch_first else x.transpose(0, 1)
        y = self.mix(y, y, y)[0]
        return y if self.mix.batch_first else y.transpose(0, 1)


LAYERS = {
    "linear": linear,
    "no bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "frozen weight": lambda: frozen("weight"),
    "frozen bias": lambda: frozen("bias"),
    "convolution": lambda: nn.Conv1d(LENGTH, LENGTH, 3, padding=1),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "instance norm": Normalised,
    "attention": Attended,
    "attention, time first": lambda: Attended(batch_first=False),
    "without a rule": Rows,
}


def pooled(change):
    return lambda s, h: change(s.m(h)).sin().mean(1)


@pytest.mark.parametrize("steps", [1, 5], ids=["first step", "later step"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_is_measured(layer, change, steps):
    torch.manual_seed(0)
    model = Body(pooled(CHANGES[change]), m=LAYERS[layer]())
    assert check(model, batch=sequences(), steps=steps) == {}


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3), (1,)])
def test_more_dimensions(shape):
    model = Body(lambda s, h: torch.relu_(s.m(h)).flatten(1, -2).mean(1), m=linear())
    assert check(model, batch=batch_of(8, *shape, WIDTH)) == {}


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    # An activation, whose result is saved, comes last.
    names=st.lists(st.sampled_from(["sum", "itself", "masked", "slices"]), max_size=3),
    last=st.sampled_from(["activation", "other views", "not at all"]),
    bias=st.booleans(),
    twice=st.booleans(),
    steps=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_chains(shape, names, last, bias, twice, steps, seed):
    def inside(s, h):
        for _ in range(1 + twice):
            h = s.m(h)
            for name in (*names, last):
                h = CHANGES[name](h)
            h = h.cos()
        return h.flatten(1, -2).mean(1)

    torch.manual_seed(seed)
    model = Body(inside, m=nn.Linear(WIDTH, WIDTH, bias=bias))
    assert check(model, batch=batch_of(8, *shape, WIDTH), steps=steps) == {}


@pytest.mark.parametrize("inplace", [True, False])
def test_layers_in_a_row(inplace):
    """What follows is still known to hold the batch: no half batch is run to find out."""
    sizes = []

    def inside(s, h):
        sizes.append(len(h))
        return s.m(h).mean(1)

    activations = [nn.ReLU(inplace=inplace), nn.Hardswish(inplace=inplace)]
    inner = nn.Sequential(linear(), activations[0], linear(), activations[1], linear())
    model = Body(inside, m=inner)
    watch(model, loss, sequences())
    assert set(sizes) == {8}
    assert check(model, batch=sequences()) == {}


# Uses of one weight more than once


def switched(s, h):
    """One of two calls is changed in place, at some steps only."""
    once = s.m(h)
    twice = s.m(torch.tanh(h))
    return (torch.relu_(twice) if s.changes else torch.relu(twice)).add(once).mean(1)


def step(changes):
    def run(model, batch):
        model.changes = changes
        return loss(model, batch)

    return run


@pytest.mark.parametrize("when", [[True], [False] * 4 + [True], [True] * 4 + [False]])
def test_a_layer_that_is_called_twice(when):
    """No call may get lost: the other one alone would be a wrong number."""
    model = Body(switched, m=linear())
    assert check(model, [step(changes) for changes in when], batch=sequences()) == {}


def test_one_of_two_passes_of_a_step():
    def both(model, batch):
        step(True)(model, batch).backward()
        model.zero_grad()
        return step(True)(model, batch)

    model = Body(switched, m=linear())
    assert check(model, [step(False)] * 4 + [both], batch=sequences(), truth=loss) == {}


def test_accumulated_passes():
    model = Body(switched, m=linear()).double()
    source = ExamplesSource(model, Inventory(model), loss_reduction="sum")
    x, y = sequences()
    found = []
    for changes in ([False, False], [True, True], [True, True]):
        model.zero_grad()
        source.open()
        for flag, part in zip(
            changes, zip(x.split([3, 5]), y.split([3, 5]), strict=True), strict=True
        ):
            (step(flag)(model, part) * len(part[0])).backward()
        norms = source.close()
        assert isinstance(norms, StepNorms)
        found.append(norms.weighted)
    assert source.inventory.missing == {}
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=0)


def test_a_tied_weight():
    def inside(s, h):
        return s.two(torch.relu_(s.one(h))).tanh_().mean(1)

    one, two = linear(), linear()
    two.weight = one.weight
    assert check(Body(inside, one=one, two=two), batch=sequences()) == {}


@pytest.mark.parametrize("sizes", [[8, 3, 8], [3, 8], [5, 6, 8]])
def test_batches_of_another_size(sizes):
    """As long as the sequences or the width among them."""
    x, y = sequences()
    steps = [lambda m, b, n=n: loss(m, (x[:n], y[:n])) for n in sizes]
    assert check(Body(pooled(torch.relu_), m=linear()), steps, sequences()) == {}


# Passes


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", ["linear", "instance norm", "attention", "without a rule"])
def test_in_activation_checkpoints(layer, reentrant):
    torch.manual_seed(0)

    def inside(s, h):
        changed = checkpoint(lambda z: torch.relu_(s.m(z)), h, use_reentrant=reentrant)
        return torch.tanh(changed).mean(1)

    assert check(Body(inside, m=LAYERS[layer]()), batch=sequences()) == {}


def test_changed_after_the_checkpoint():
    def inside(s, h):
        return checkpoint(s.m, h, use_reentrant=False).relu_().mean(1)

    assert check(Body(inside, m=linear()), batch=sequences()) == {}


def test_a_hook_of_the_users_that_changes_the_gradient():
    """What the layer's parameters get is what comes out of the hook."""

    def inside(s, h):
        out = s.m(h)
        out.register_hook(lambda g: g * 2)
        return out.tanh().mean(1)

    assert check(Body(inside, m=linear()), batch=sequences()) == {}


def test_a_graph_differentiated_twice_is_left_out():
    def twice(model, batch):
        value = loss(model, batch)
        value.backward(retain_graph=True)
        return value

    model = Body(pooled(torch.relu_), m=linear())
    source, _ = watch(model, [loss] * 4 + [twice], sequences())
    assert "twice" in source.inventory.missing["m.weight"]


def test_under_autocast():
    """In bfloat16 squares agree with those of the same passes without operations in place."""

    def run(change, steps):
        model = Body(pooled(change), m=nn.Sequential(linear(), nn.LayerNorm(WIDTH), linear()))
        source = ExamplesSource(model, Inventory(model))
        x, y = sequences()
        for _ in range(steps):
            model.zero_grad()
            source.open()
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(model, (x.float(), y))
            value.backward()
            norms = source.close()
        assert isinstance(norms, StepNorms)
        assert source.inventory.missing == {}
        return norms.weighted

    for steps in (1, 4):
        # The same operations on the same numbers: what differs is where they are written.
        assert torch.equal(run(torch.relu_, steps), run(torch.relu, steps))


def net(inplace=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8),
        nn.ReLU(inplace=inplace),
        nn.Linear(8, 8),
        nn.Dropout(0.1, inplace=inplace),
        nn.InstanceNorm1d(16, affine=True),
        nn.LeakyReLU(inplace=inplace),
        nn.Linear(8, 2),
    )


def train(*, mode=None, backend=None, every=1, dtype=None):
    model = net()
    called = model if backend is None else torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    meter = None if mode is None else NoiseMeter(model, optimizer, mode=mode, every=every)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        optimizer.zero_grad()
        x = torch.randn(6, 16, 3, generator=generator)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            value = called(x).square().mean()
        value.backward()
        optimizer.step()
    if meter is not None:
        estimate = meter.estimate()
        assert not estimate.parameters_seen.missing
        meter.detach()
    return [*model.state_dict().values(), torch.rand(2)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_training_is_bit_identical(mode, every, dtype):
    pairs = zip(train(mode=mode, every=every, dtype=dtype), train(dtype=dtype), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_model():
    """aot_eager runs the kernels of eager mode."""
    torch.compiler.reset()
    watched = train(mode="exact", every=2, backend="aot_eager")
    torch.compiler.reset()
    plain = train(backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))


def test_mode_fused_runs_the_same_training():
    """Its layers' outputs may be changed in place, too; sums are re-ordered."""
    for ours, theirs in zip(train(mode="fused"), train(), strict=True):
        torch.testing.assert_close(ours, theirs)
