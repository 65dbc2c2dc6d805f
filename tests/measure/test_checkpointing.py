"""Activation checkpointing and other hooks on saved tensors: right numbers, memory still saved."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from noisescale import NoiseMeter
from watched import WIDTH, Body, batch_of, check, layers, linear, loss

# A re-entrant block without gradients warns, as the inner one of two does on its first pass.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

both = pytest.mark.parametrize("reentrant", [False, True])
REENTRANT = "re-entrant activation checkpoint"


def kind(reentrant):
    return lambda function, *args: checkpoint(function, *args, use_reentrant=reentrant)


def twins():
    one, two = linear(), linear()
    two.weight = one.weight
    return {"one": one, "two": two}


@both
@pytest.mark.parametrize(
    "inside",
    [
        lambda ck: lambda s, h: ck(s.m, h),
        lambda ck: lambda s, h: ck(lambda z: ck(s.m, torch.tanh(s.n(z))), h),
        lambda ck: lambda s, h: ck(lambda z: s.n(ck(lambda w: ck(s.m, w).tanh(), z.sin())), h),
        lambda ck: lambda s, h: ck(lambda z: s.n(torch.tanh(s.n(z))), s.m(h)),
        lambda ck: lambda s, h: ck(s.n, torch.tanh(s.n(s.m(h)))),
        lambda ck: lambda s, h: ck(s.m, s.n(h.detach())) + h,
    ],
    ids=["block", "nested", "nested thrice", "used twice", "outside, then inside", "detached"],
)
def test_blocks(inside, reentrant):
    model = Body(inside(kind(reentrant)), m=layers(nn.ReLU(inplace=True)), n=linear())
    assert check(model) == {}


@both
def test_checkpoint_sequential(reentrant):
    model = Body(
        lambda s, h: checkpoint_sequential(s.m, 2, h, use_reentrant=reentrant),
        m=nn.Sequential(*layers(), nn.Tanh(), *layers(nn.LayerNorm(WIDTH), nn.PReLU())),
    )
    assert check(model) == {}


@both
def test_reentrant_inside_the_other_kind_and_round(reentrant):
    inner, outer = kind(reentrant), kind(not reentrant)
    assert check(Body(lambda s, h: outer(lambda z: inner(s.m, z.sin()), h), m=layers())) == {}


@both
@pytest.mark.parametrize("pieces", [1, 2])
def test_the_whole_model(reentrant, pieces):
    """Its call is seen once per pass, though it runs twice."""

    def step(model, batch):
        for x, y in zip(batch[0].chunk(pieces), batch[1].chunk(pieces), strict=True):
            out = kind(reentrant)(model, x.clone().requires_grad_())
            (F.cross_entropy(out, y) / pieces).backward()

    assert check(Body(m=layers()), step) == {}


@both
def test_tied_weights_inside_one_block_or_first_outside(reentrant):
    ck = kind(reentrant)
    assert check(Body(lambda s, h: ck(lambda z: s.two(s.one(z).tanh()), h), **twins())) == {}
    assert check(Body(lambda s, h: ck(s.two, s.one(h).tanh()), **twins())) == {}


@pytest.mark.parametrize(
    "inside",
    [
        lambda ck: lambda s, h: ck(s.two, ck(s.one, h).tanh()),
        lambda ck: lambda s, h: s.two(ck(s.one, h).tanh()),
    ],
    ids=["two blocks", "inside, then outside"],
)
def test_two_uses_that_come_apart_are_left_out(inside):
    """Re-entrant blocks deliver their gradients one after the other."""
    assert check(Body(inside(kind(False)), **twins())) == {}
    missing = check(Body(inside(kind(True)), **twins()))
    assert "one.weight" in missing
    assert all(REENTRANT in reason for reason in missing.values())


def test_two_passes_before_one_backward():
    def joint(model, batch):
        halves = zip(batch[0].chunk(2), batch[1].chunk(2), strict=True)
        return sum(loss(model, half) / 2 for half in halves)

    assert check(Body(lambda s, h: kind(False)(s.m, h), m=layers()), joint) == {}
    missing = check(Body(lambda s, h: kind(True)(s.m, h), m=layers()), joint)
    assert set(missing) == {f"m.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}


def other_pass(model, batch, mode, reentrant):
    """A pass through the same layers that is no training step."""
    model.train(mode != "eval")
    x = batch[0].clone().requires_grad_()
    out = model(x) if mode == "eval" else kind(reentrant)(model.m, x).tanh()[:, :3]
    F.cross_entropy(out, batch[1]).backward()
    model.zero_grad()
    model.train()


@both
@pytest.mark.parametrize("mode", ["eval", "part"])
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_pass_that_is_not_measured(mode, when, reentrant):
    """It neither counts nor disturbs the checkpoint."""

    def step(model, batch):
        if when == "before":
            other_pass(model, batch, mode, reentrant)
        value = loss(model, batch)
        if when == "between":
            other_pass(model, batch, mode, reentrant)
        return value

    missing = check(Body(lambda s, h: kind(reentrant)(s.m, h), m=layers()), [loss] * 4 + [step])
    assert all(name.startswith("m.") for name in missing)
    assert not missing or (reentrant and when == "between")


def test_validation_between_the_two_passes():
    def step(model, batch):
        value = loss(model, batch)
        with torch.no_grad():
            model(batch[0])
        return value

    for reentrant in (False, True):
        assert check(Body(lambda s, h, r=reentrant: kind(r)(s.m, h), m=layers()), step) == {}


def test_offloading_to_the_host():
    def inside(s, h):
        with save_on_cpu():
            return s.m(h)

    assert check(Body(inside, m=layers())) == {}


class Deep(nn.Module):
    """Blocks whose inner activations are worth saving."""

    def __init__(self, way):
        super().__init__()
        self.way, self.alive = way, []
        self.blocks = nn.ModuleList(nn.Sequential(linear(), nn.Tanh(), linear()) for _ in range(4))
        for block in self.blocks:
            block[1].register_forward_hook(lambda _, args, out: self.note(*args, out))

    def note(self, *tensors):
        self.alive += [weakref.ref(t.untyped_storage()) for t in tensors]

    def forward(self, x):
        for block in self.blocks:
            x = self.way(block, x)
        return x


def offloaded(block, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return block(x)


@pytest.mark.parametrize(
    ("way", "saved"),
    [
        (kind(False), 0),
        (kind(True), 0),
        (offloaded, 0),
        (lambda block, x: block(x), 4),
    ],
    ids=["non-reentrant", "re-entrant", "offloaded", "plain"],
)
@pytest.mark.parametrize("metered", [False, True])
def test_what_is_alive_after_the_forward_pass(way, saved, metered):
    """Of every block's inner activations; a plain model keeps the output of its Tanh."""
    model = Deep(way)
    meter = NoiseMeter(model, source="examples") if metered else None
    for _ in range(5):
        model.alive.clear()
        value = model(torch.randn(8, WIDTH, requires_grad=True)).square().mean()
        gc.collect()
        assert sum(ref() is not None for ref in model.alive) == saved
        value.backward()
        if meter is not None:
            meter.close_step()
        model.zero_grad()
    if meter is not None:
        assert meter.steps == 5
        assert meter.missing == {}
        meter.detach()


@both
def test_dropout_repeats_its_mask(reentrant):
    """The same random numbers with and without the meter, in both passes."""

    def run(metered):
        torch.manual_seed(0)
        model = Body(lambda s, h: kind(reentrant)(s.m, h), m=layers(nn.Dropout(0.3)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        meter = NoiseMeter(model, optimizer, source="examples") if metered else None
        for _ in range(6):
            optimizer.zero_grad()
            loss(model.float(), (batch_of()[0].float(), batch_of()[1])).backward()
            optimizer.step()
        if meter is not None:
            meter.detach()
            assert (meter.steps, meter.missing) == (6, {})
        return [*model.parameters(), torch.rand(2)]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@both
def test_dropout_is_that_of_the_pass(reentrant):
    """With p so small that it never drops, the numbers are those of separate passes."""
    model = Body(lambda s, h: kind(reentrant)(s.m, h), m=layers(nn.Dropout(1e-12)))
    assert check(model) == {}
