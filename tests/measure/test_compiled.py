"""torch.compile before or after the meter: measured steps run uncompiled, the others compiled."""

from __future__ import annotations

import gc
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from noisescale import NoiseMeter, Outcome, measure_noise_scale
from noisescale.measure import compiled
from noisescale.measure.compiled import plain, plain_name
from noisescale.measure.gradients import Inventory

pytestmark = [
    # What torch.compile itself warns of while it traces.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
    pytest.mark.filterwarnings("ignore:Profiler record function"),
]

BACKENDS = ["eager", "aot_eager"]


class Net(nn.Module):
    """A layer that is used twice, a parameter of the model's own, blocks in a list."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.position = nn.Parameter(torch.full((6,), 0.1))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = x + self.position
        for block in (*self.blocks, self.blocks[0]):
            h = h + block(h)
        return self.head(h)


@pytest.fixture(autouse=True)
def fresh():
    # Meters of other tests that were never detached.
    gc.collect()
    compiled._holders.clear()
    compiled._stance.clear()
    torch.compiler.set_stance("default")
    torch.compiler.reset()
    counters.clear()
    yield
    assert stance() == "default"
    torch.compiler.reset()


def stance():
    held = torch.compiler.set_stance("default")
    held.__exit__(None, None, None)
    return held.prev.stance


def plain_model(model, **options):
    return model


def wrapped(model, **options):
    return torch.compile(model, **options)


def by_method(model, **options):
    model.compile(**options)
    return model


def by_block(model, **options):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, **options)
    return model


WAYS = [wrapped, by_method, by_block]


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator)
        yield x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def train(way, when="before", *, steps=7, meter_gets="called", options=None, pieces=1, **settings):
    """Train a few steps; ``when`` the model was compiled, seen from the meter."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called = model
    settings = {"source": "examples", **settings}
    options = options or {"backend": "aot_eager"}
    if when != "after":
        called = way(model, **options)
    if when == "long before":
        for x, _ in batches(2):
            called(x).sum().backward()
    meter = NoiseMeter(called if meter_gets == "called" else model, optimizer, **settings)
    if when == "after":
        called = way(model, **options)
    for x, y in batches(steps):
        optimizer.zero_grad()
        for part in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            (F.cross_entropy(called(part[0]), part[1]) / pieces).backward()
        optimizer.step()
    meter.detach()
    return meter, [p.detach().clone() for p in model.parameters()]


def assert_same(found, expected):
    assert found.missing == {}
    assert found.history.step.tolist() == expected.history.step.tolist()
    np.testing.assert_allclose(found.history.grad_sq, expected.history.grad_sq, rtol=1e-4)
    np.testing.assert_allclose(found.history.trace_cov, expected.history.trace_cov, rtol=1e-4)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("when", ["after", "before", "long before"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_numbers_are_those_of_the_plain_model(way, when, every, backend):
    expected, _ = train(plain_model, every=every)
    found, _ = train(way, when, every=every, options={"backend": backend})
    assert_same(found, expected)


@pytest.mark.parametrize("when", ["before", "long before"])
def test_given_the_plain_model_of_a_wrapper(when):
    assert_same(train(wrapped, when, meter_gets="plain")[0], train(plain_model)[0])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("when", ["after", "before", "long before"])
def test_fullgraph_does_not_crash(when, every):
    options = {"backend": "aot_eager", "fullgraph": True}
    found, _ = train(wrapped, when, options=options, every=every)
    assert_same(found, train(plain_model, every=every)[0])


def test_fail_on_recompile_is_put_back():
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(train(wrapped, "after")[0], train(plain_model)[0])
        assert stance() == "fail_on_recompile"


def test_a_stance_taken_while_a_step_is_open_stays():
    meter = NoiseMeter(Net())
    assert stance() == "force_eager"
    torch.compiler.set_stance("eager_on_recompile")
    meter.detach()
    assert stance() == "eager_on_recompile"
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("late", [False, True])
def test_a_step_with_another_stance_is_refused_and_the_next_one_measured(late):
    """Hooks that are traced after all do nothing, in a full graph too."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for x, _ in batches(int(late)):
        compiled(x).sum().backward()
    with NoiseMeter(compiled, optimizer) as meter:
        torch.compiler.set_stance("default")
        for x, y in batches(3):
            optimizer.zero_grad()
            F.cross_entropy(compiled(x), y).backward()
            optimizer.step()
        assert meter.history.step.tolist() == [1, 2]
        assert meter.missing == {}
        assert "set_stance" in meter.estimate().detail


def test_two_meters_hold_until_both_are_done():
    one, other = NoiseMeter(Net()), NoiseMeter(Net())
    one.detach()
    one.detach()
    assert stance() == "force_eager"
    other.detach()
    assert stance() == "default"


def test_a_forgotten_meter_lets_go_with_its_model():
    model = Net()
    NoiseMeter(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert stance() == "force_eager"
    del model
    gc.collect()
    assert stance() == "default"


@pytest.mark.parametrize("way", WAYS)
def test_steps_between_are_compiled_once(way):
    """Neither hooks nor their absence make anything compile again."""
    train(way, "after", every=3, steps=12)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_steps_between_run_compiled_code():
    ran = []

    def backend(graph, inputs):
        return lambda *args: ran.append(1) or graph(*args)

    train(wrapped, "after", every=3, steps=9, options={"backend": backend})
    assert len(ran) == 6


@pytest.mark.parametrize("every", [1, 3])
def test_a_compiled_training_step(every):
    """Forward, backward and optimizer inside one compiled function."""

    def run(whole):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        meter = NoiseMeter(model, optimizer, every=every, source="examples")

        def step(x, y):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        step = torch.compile(step, backend="eager") if whole else step
        for batch in batches(9):
            step(*batch)
        meter.detach()
        return meter

    found = run(True)
    assert_same(found, run(False))
    assert counters["stats"]["unique_graphs"] < 10


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("every", [1, 2])
def test_training_is_bit_identical(way, every):
    """aot_eager runs the kernels of eager mode."""
    _, watched = train(way, "after", every=every)
    torch.compiler.reset()
    _, other = train(way, "after", every=1000)
    _, eager = train(plain_model, every=1000)
    for a, b, c in zip(watched, other, eager, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("when", ["after", "before", "long before"])
@pytest.mark.parametrize("way", WAYS)
def test_microbatches(way, when):
    found, _ = train(way, when, source="microbatches", pieces=2)
    assert_same(found, train(plain_model, source="microbatches", pieces=2)[0])


def test_microbatches_of_a_wrapper_stay_compiled():
    ran = []

    def backend(graph, inputs):
        return lambda *args: ran.append(1) or graph(*args)

    train(wrapped, source="microbatches", pieces=2, steps=3, options={"backend": backend})
    assert len(ran) == 6


def test_names_are_those_of_the_plain_model():
    names = [name for name, _ in Net().named_parameters()]
    for way in WAYS:
        inventory = Inventory(way(Net(), backend="eager"))
        assert [slot.name for slot in inventory.slots] == names
        assert {slot.group for slot in inventory.slots} == {
            "(model)",
            "blocks.0.0",
            "blocks.1.0",
            "head",
        }
    assert plain_name("_orig_mod.blocks.0._orig_mod.weight") == "blocks.0.weight"
    assert type(plain(torch.compile(Net()))) is Net


def test_batchnorm_is_named_without_the_wrapper():
    model = torch.compile(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), backend="eager")
    meter = NoiseMeter(model, source="examples")
    model(torch.randn(8, 6)).square().mean().backward()
    meter.close_step()
    meter.detach()
    found = meter.estimate()
    assert found.outcome == Outcome.UNSUPPORTED
    assert "BatchNorm '1'" in found.detail


def test_check_and_split_pass_and_fixed_weights():
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    batch = next(batches(1))
    model = torch.compile(Net(), backend="aot_eager")
    with NoiseMeter(model) as meter:
        assert meter.check(batch, loss).agrees
    with NoiseMeter(model, source="microbatches") as meter:
        assert meter.split_pass(loss, batch, micro_batch_size=2)
    torch.manual_seed(0)
    data = tuple(torch.cat(parts) for parts in zip(*batches(8), strict=True))
    found, _ = measure_noise_scale(plain(model), loss, data, batch_size=8, steps=4, seed=0)
    again, _ = measure_noise_scale(model, loss, data, batch_size=8, steps=4, seed=0)
    assert found.trace_cov == pytest.approx(again.trace_cov, rel=1e-5)
    assert stance() == "default"


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_inductor():
    expected, _ = train(plain_model, every=3)
    found, _ = train(wrapped, "long before", every=3, options={"backend": "inductor"})
    assert_same(found, expected)
