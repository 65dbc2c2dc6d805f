"""Parameters that a module uses without a layer, against a separate backward pass per example."""

from __future__ import annotations

import gc
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from noisescale import NoiseMeter
from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory
from noisescale.measure.rules import whole_module
from per_example import assert_exact, mean_square, measured
from reference import per_example_gradients

WIDTH, LENGTH = 4, 5


def sized(shape):
    return nn.Parameter(torch.randn(shape))


class Model(nn.Module):
    """Tokens -> what a test is about -> head."""

    def __init__(self, inside, **parameters):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.inside = inside
        for name, shape in parameters.items():
            setattr(self, name, sized(shape))

    def forward(self, ids):
        return self.head(torch.tanh(self.inside(self, self.table(ids), ids)))


@pytest.fixture
def no_repetition(monkeypatch):
    """Nothing is run again."""

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(whole_module, "vjp", refuse)


def halves(model, x, ids):
    return torch.where(ids.unsqueeze(-1) > 3, model.p, x)


CASES = {
    "positions": (lambda m, x, _: x + m.p, {"p": (LENGTH, WIDTH)}),
    "positions, cut": (lambda m, x, _: x + m.p[: x.shape[1]], {"p": (9, WIDTH)}),
    "positions, cut, batched": (lambda m, x, _: x + m.p[:, : x.shape[1]], {"p": (1, 9, WIDTH)}),
    "subtracted": (lambda m, x, _: x - m.p, {"p": (WIDTH,)}),
    "subtracted, with a factor": (lambda m, x, _: torch.sub(x, m.p, alpha=3), {"p": (WIDTH,)}),
    "added, with a factor": (lambda m, x, _: torch.add(x, m.p, alpha=3), {"p": (1, WIDTH)}),
    "scaled": (lambda m, x, _: m.p * x, {"p": (WIDTH,)}),
    "scaled on the right": (lambda m, x, _: x * m.p, {"p": (1, WIDTH)}),
    "one number": (lambda m, x, _: x * m.p, {"p": ()}),
    "one number of a shape": (lambda m, x, _: x * m.p, {"p": (1,)}),
    "temperature": (lambda m, x, _: x * m.p.exp(), {"p": ()}),
    "softplus": (lambda m, x, _: x * F.softplus(m.p) + m.p.sigmoid(), {"p": (WIDTH,)}),
    "divided": (lambda m, x, _: m.p / (1 + x.square()), {"p": (LENGTH, WIDTH)}),
    "scale and shift": (lambda m, x, _: x * m.p + m.q, {"p": (WIDTH,), "q": (WIDTH,)}),
    "residual": (lambda m, x, _: x + m.p * torch.tanh(x * m.p), {"p": (WIDTH,)}),
    "used thrice": (lambda m, x, _: (x + m.p) * m.p + m.p[0], {"p": (LENGTH, WIDTH)}),
    "two tables": (lambda m, x, _: x + (m.p + m.q), {"p": (LENGTH, WIDTH), "q": (WIDTH,)}),
    "product of two": (lambda m, x, _: x + m.p * m.q, {"p": (LENGTH, WIDTH), "q": (WIDTH,)}),
    "squared": (lambda m, x, _: x + m.p**2 - m.p * m.p, {"p": (LENGTH, WIDTH)}),
    "turned": (lambda m, x, _: x + m.p.T, {"p": (WIDTH, LENGTH)}),
    "reshaped": (lambda m, x, _: x + m.p.view(LENGTH, WIDTH), {"p": (LENGTH * WIDTH,)}),
    "row": (lambda m, x, _: x + m.p[0, 1], {"p": (2, 3, WIDTH)}),
    "expanded": (
        lambda m, x, _: torch.cat([m.p.expand(len(x), -1, -1), x], 1),
        {"p": (1, 1, WIDTH)},
    ),
    "repeated": (
        lambda m, x, _: torch.cat([m.p.repeat(len(x), 1, 1), x], 1),
        {"p": (1, 2, WIDTH)},
    ),
    "expanded without batch": (lambda m, x, _: x + m.p.expand(LENGTH, -1), {"p": (1, WIDTH)}),
    "mask token": (halves, {"p": (WIDTH,)}),
    "table by arange": (
        lambda m, x, _: x + F.embedding(torch.arange(x.shape[1]), m.p),
        {"p": (9, WIDTH)},
    ),
    "table by index": (
        lambda m, x, _: x + m.p[torch.tensor([0, 2, 2, -1, 1])],
        {"p": (9, WIDTH)},
    ),
    "table by ids": (lambda m, x, ids: x + F.embedding(ids, m.p), {"p": (7, WIDTH)}),
    "table indexed by ids": (lambda m, x, ids: x + m.p[ids], {"p": (7, WIDTH)}),
    "projected": (lambda m, x, _: x[:, 0] @ m.p, {"p": (WIDTH, WIDTH)}),
    "projected, turned": (lambda m, x, _: F.linear(x[:, 0], m.p), {"p": (WIDTH, WIDTH)}),
    "with dropout": (lambda m, x, _: F.dropout(x, 0.0) + m.p, {"p": (LENGTH, WIDTH)}),
    "not used": (lambda m, x, _: x + m.p, {"p": (WIDTH,), "q": (3,)}),
}


def model_and_batch(case, size=6):
    inside, parameters = CASES[case]
    return Model(inside, **parameters), (torch.randint(0, 7, (size, LENGTH)),)


@pytest.mark.usefixtures("no_repetition")
@pytest.mark.parametrize("size", [2, 5, 6, 4, 7])
@pytest.mark.parametrize("case", CASES)
def test_exact_and_not_run_again(case, size):
    """Batches of as many examples as there are positions, channels or rows, too."""
    torch.manual_seed(1)
    assert_exact(*model_and_batch(case, size))


# Ways from a table (LENGTH, WIDTH) to one of the same shape, and from there to the batch.
WITHIN = {
    "twice turned": lambda t: F.softplus(t.T).T,
    "cut and doubled": lambda t: t[[0, 1, 1, 3, 4]] * 2,
    "a row for all": lambda t: t[1].unsqueeze(0).expand(LENGTH, WIDTH),
    "reshaped": lambda t: t.flatten().view(WIDTH, LENGTH).t().clone(),
    "shifted": lambda t: 1 - (t + 0.3) / 2,
    "squashed": lambda t: t.tanh() * t.sigmoid(),
    "itself": lambda t: t,
}
ONTO = {
    "+": lambda x, t: x + t,
    "-": lambda x, t: x - t[None],
    "*": lambda x, t: t * x,
    "/": lambda x, t: t / (2 + x.square()),
    "first": lambda x, t: x * t[:1],
    "last": lambda x, t: x + t[-1],
    "before": lambda x, t: torch.cat([t.expand(len(x), -1, -1), x], 1)[:, :LENGTH],
}
WAYS = st.tuples(
    st.lists(st.sampled_from(sorted(WITHIN)), max_size=3), st.sampled_from(sorted(ONTO))
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    ways=st.lists(WAYS, min_size=1, max_size=3),
    size=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_ways_to_the_batch(ways, size, seed):
    """Any ways, one after the other: exact, whether they could be followed or not."""

    def inside(model, x, _):
        for within, onto in ways:
            table = model.p
            for name in within:
                table = WITHIN[name](table)
            x = ONTO[onto](x, table)
        return x

    torch.manual_seed(seed)
    assert_exact(Model(inside, p=(LENGTH, WIDTH)), (torch.randint(0, 7, (size, LENGTH)),))


def by_graph(model, batch):
    """Sum over the examples of squared gradients, each example's out of the same graph."""
    model.zero_grad()
    out = model(*batch)
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view_as(out[0])
    each = (torch.sin(out) * weights).flatten(1).sum(1)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    sums = dict.fromkeys((n for n, _ in named), 0.0)
    for one in each:
        found = torch.autograd.grad(one, [p for _, p in named], retain_graph=True)
        for (name, _), g in zip(named, found, strict=True):
            sums[name] += float(g.square().sum())
    return sums


def test_random_numbers_do_not_matter():
    torch.manual_seed(0)
    model = Model(lambda m, x, _: F.dropout(F.dropout(x) + m.p) * m.q, p=(LENGTH, 4), q=(4,))
    model.double()
    batch = (torch.randint(0, 7, (6, LENGTH)),)
    torch.manual_seed(1)
    expected = by_graph(model, batch)
    torch.manual_seed(1)
    source, norms = measured(model, mean_square, batch)
    assert source.inventory.missing == {}
    found = norms.weighted.mul(norms.weighted_factor).tolist()
    assert found == pytest.approx(list(expected.values()), rel=1e-9)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_what_mixes_examples_is_still_left_out(rate):
    def inside(model, x, _):
        return F.dropout((x - x.mean(0)) / x.std(0) + x.tanh() * model.p, rate)

    def centred(model, x, _):
        h = x * model.p
        return F.dropout(h - h.mean(0), rate)

    for mixing in (inside, centred):
        torch.manual_seed(0)
        model = Model(mixing, p=(WIDTH,)).double()
        batch = (torch.randint(0, 7, (6, LENGTH)),)
        source = ExamplesSource(model, Inventory(model))
        assert source._calls.layers[0].direct is not None
        source.open()
        mean_square(model, batch).backward()
        source.close()
        assert "p" in source.inventory.missing
        source.detach()


def test_batches_of_any_size_one_after_the_other():
    torch.manual_seed(0)
    model = Model(lambda m, x, _: (x + m.p[: x.shape[1]]) * m.q, p=(9, WIDTH), q=(WIDTH,)).double()
    source = ExamplesSource(model, Inventory(model))
    for size, length in ((6, 5), (1, 5), (5, 5), (3, 3), (1, 2), (9, 4), (4, 9)):
        batch = (torch.randint(0, 7, (size, length)),)
        truth = per_example_gradients(model, mean_square, batch)
        model.zero_grad()
        source.open()
        mean_square(model, batch).backward()
        norms = source.close()
        expected = [float(rows.square().sum()) for rows in truth.values()]
        found = norms.weighted.mul(norms.weighted_factor).tolist()
        assert found == pytest.approx(expected, rel=1e-9)
    source.detach()


@pytest.mark.parametrize("size", [4, 5])
def test_shared_with_a_layer(size):
    def inside(model, x, _):
        return torch.tanh(model.inner(x)) * model.p + x

    model = Model(inside)
    model.inner = nn.LayerNorm(WIDTH)
    model.p = model.inner.weight
    assert_exact(model, (torch.randint(0, 7, (size, LENGTH)),))


def test_one_parameter_of_two_names():
    model = Model(lambda m, x, _: x * m.p + m.q, p=(WIDTH,))
    model.q = model.p
    assert_exact(model, (torch.randint(0, 7, (6, LENGTH)),))


class Checkpointed(Model):
    """Its parameter is used inside and outside of an activation checkpoint."""

    def __init__(self, reentrant):
        super().__init__(self.run, p=(WIDTH,), q=(LENGTH, WIDTH))
        self.reentrant = reentrant

    def run(self, _, x, ids):
        def part(x):
            return torch.tanh(x * self.p)

        return checkpoint(part, x + self.q, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_run_as_they_would(reentrant):
    weights = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(reentrant)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        meter = NoiseMeter(model, optimizer, source="examples") if watched else None
        for _ in range(3):
            optimizer.zero_grad()
            ids = torch.randint(0, 7, (6, LENGTH))
            mean_square(model, (ids,)).backward()
            optimizer.step()
        weights.append(list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert set(meter.missing) <= {"p", "q"}
    truth = per_example_gradients(model, mean_square, (ids,))
    optimizer.zero_grad()
    mean_square(model, (ids,)).backward()
    norms = meter._source.close()
    for i, (name, rows) in enumerate(truth.items()):
        if name not in meter.missing:
            found = float(norms.weighted[i]) * norms.weighted_factor
            assert found == pytest.approx(float(rows.square().sum()), rel=1e-4)


def test_under_autocast():
    def inside(model, x, _):
        return model.middle(model.p[: x.shape[1]] + x) * model.q + model.r

    torch.manual_seed(0)
    model = Model(inside, p=(9, WIDTH), q=(WIDTH,), r=(1,))
    model.middle = nn.Linear(WIDTH, WIDTH)
    batch = (torch.randint(0, 7, (6, LENGTH)),)

    def loss(model, batch):
        if next(model.parameters()).dtype == torch.float64:
            return mean_square(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*batch)
        weights = torch.linspace(0.5, 1.5, out[0].numel()).view_as(out[0])
        return (torch.sin(out.float()) * weights).flatten(1).sum(1).mean()

    truth = per_example_gradients(model, mean_square, batch)
    source, norms = measured(model, loss, batch)
    assert source.inventory.missing == {}
    expected = [float(rows.square().sum()) for rows in truth.values()]
    found = norms.weighted.mul(norms.weighted_factor).tolist()
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_training_is_bit_identical(mode):
    def inside(model, x, _):
        return F.dropout(x + model.p[: x.shape[1]], 0.3) * F.softplus(model.q)

    weights = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Model(inside, p=(9, WIDTH), q=(WIDTH,))
        optimizer = torch.optim.AdamW(model.parameters())
        meter = NoiseMeter(model, optimizer, mode=mode, source="examples") if watched else None
        for _ in range(6):
            optimizer.zero_grad()
            mean_square(model, (torch.randint(0, 7, (6, LENGTH)),)).backward()
            optimizer.step()
        weights.append([*model.state_dict().values(), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert (meter.steps, meter.missing) == (6, {})


class Tagged(torch.autograd.Function):
    """Lives as long as the graph does."""

    tags: ClassVar[list] = []

    @staticmethod
    def forward(ctx, x):
        ctx.tag = type("Tag", (), {})()
        Tagged.tags.append(weakref.ref(ctx.tag))
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("backward", [True, False])
def test_no_graph_is_kept_alive(backward):
    def inside(model, x, _):
        return Tagged.apply(x) * model.p.exp() + model.q[: x.shape[1]]

    Tagged.tags.clear()
    torch.manual_seed(0)
    model = Model(inside, p=(WIDTH,), q=(9, WIDTH))
    meter = NoiseMeter(model, source="examples")
    gc.disable()
    try:
        for _ in range(3):
            model.zero_grad()
            loss = mean_square(model, (torch.randint(0, 7, (6, LENGTH)),))
            if backward:
                loss.backward()
            del loss
            meter.close_step()
        assert [tag() for tag in Tagged.tags[-2:]] == [None, None]
    finally:
        gc.enable()


def test_a_second_backward_pass_is_no_second_use():
    torch.manual_seed(0)
    model = Model(lambda m, x, _: x * m.p, p=(WIDTH,))
    meter = NoiseMeter(model, source="examples")
    for twice in (False, True):
        model.zero_grad()
        loss = mean_square(model, (torch.randint(0, 7, (6, LENGTH)),))
        loss.backward(retain_graph=twice)
        if twice:
            loss.backward()
        meter.close_step()
    assert "p" in meter.missing


class Collecting(nn.Module):
    """Keeps what its forward pass made, and draws from generators of its own."""

    def __init__(self):
        super().__init__()
        self.made, self.generator = [], torch.Generator().manual_seed(0)
        self.other = np.random.default_rng(0)

    def forward(self, x):
        noise = torch.rand(x.shape, generator=self.generator) + self.other.random()
        self.made.append((x * noise).square().mean())
        return x * noise


def test_a_look_at_half_a_batch_leaves_no_trace():
    weights = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Model(lambda m, x, _: m.inner(x) * m.p, p=(WIDTH,))
        model.inner = Collecting()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        meter = NoiseMeter(model, optimizer, source="examples") if watched else None
        for _ in range(3):
            optimizer.zero_grad()
            loss = mean_square(model, (torch.randint(0, 7, (6, LENGTH)),))
            (loss + sum(model.inner.made)).backward()
            model.inner.made.clear()
            optimizer.step()
        weights.append(list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert (meter.steps, meter.missing) == (3, {})
