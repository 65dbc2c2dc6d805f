"""Inputs as long as the batch that hold no batch, against a separate backward pass per example."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory
from per_example import assert_exact, mean_square
from reference import per_example_gradients

WIDTH = 4


class Model(nn.Module):
    """Layer -> what a test is about."""

    def __init__(self, inside, **children):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.inside = inside
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.inside(self, torch.tanh(self.first(x)))


def sized(*shape):
    return nn.Parameter(torch.randn(shape))


def assert_every_step(model, sizes):
    """Of batches of several sizes, one after the other; returns what is left out in the end."""
    source = ExamplesSource(model.double(), Inventory(model))
    for size in sizes:
        batch = (torch.randn(size, WIDTH, dtype=torch.float64),)
        truth = per_example_gradients(model, mean_square, batch)
        model.zero_grad()
        source.open()
        mean_square(model, batch).backward()
        norms = source.close()
        for i, (name, rows) in enumerate(truth.items()):
            if name not in source.inventory.missing:
                found = float(norms.weighted[i]) * norms.weighted_factor
                assert found == pytest.approx(float(rows.square().sum()), rel=1e-9), (size, name)
    source.detach()
    return set(source.inventory.missing)


class Scaled(nn.Module):
    """A module without a rule that gets more than the batch."""

    def __init__(self):
        super().__init__()
        self.w = sized(WIDTH, WIDTH)

    def forward(self, x, scale):
        return torch.einsum("nd,de->ne", x, self.w) * scale


SCALES = {
    "made of a parameter": lambda m, x: m.inner(x, m.scale.exp()),
    "constant": lambda m, x: m.inner(x, m.scale.detach()),
    "two calls": lambda m, x: m.inner(m.inner(x, x + 1), m.scale.exp()),
}


@pytest.mark.parametrize("case", SCALES)
def test_an_argument_that_a_later_batch_is_as_long_as(case):
    torch.manual_seed(0)
    model = Model(SCALES[case], inner=Scaled(), scale=sized(WIDTH))
    model.scale.requires_grad_(case != "constant")
    assert assert_every_step(model, (6, WIDTH, 5, 1, WIDTH)) == set()


@pytest.mark.parametrize("case", SCALES)
def test_an_argument_that_the_first_batch_is_as_long_as(case):
    torch.manual_seed(0)
    model = Model(SCALES[case], inner=Scaled(), scale=sized(WIDTH))
    model.scale.requires_grad_(case != "constant")
    assert assert_every_step(model, (WIDTH, 6)) == {"inner.w"}


ROWS = 6
MAKERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "normalised": lambda: nn.LayerNorm(WIDTH),
    "without a rule": lambda: nn.PReLU(WIDTH),
    "one after the other": lambda: nn.Sequential(
        nn.Linear(WIDTH, 3), nn.Tanh(), nn.Linear(3, WIDTH)
    ),
}


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("case", MAKERS)
def test_a_layer_of_a_table_with_as_many_rows_as_the_batch(case, learnt):
    """Class prototypes, say: no row is an example's, though the sums of gradients agree."""

    def inside(model, x):
        return x @ model.maker(torch.tanh(model.table)).T

    torch.manual_seed(0)
    model = Model(inside, maker=MAKERS[case](), table=sized(ROWS, WIDTH).requires_grad_(learnt))
    names = {f"maker.{name}" for name, _ in model.maker.named_parameters()}
    batch = (torch.randn(ROWS, WIDTH),)
    assert_exact(model, batch, left_out=names)


def test_attention_over_a_table_with_as_many_columns_as_the_batch():
    def inside(model, x):
        table = torch.tanh(model.table)
        return x @ model.maker(table, table, table)[0][0].T

    torch.manual_seed(0)
    maker = nn.MultiheadAttention(WIDTH, 2)
    model = Model(inside, maker=maker, table=sized(5, ROWS, WIDTH))
    names = {f"maker.{name}" for name, _ in maker.named_parameters()}
    assert_exact(model, (torch.randn(ROWS, WIDTH),), left_out=names)


def test_what_was_made_of_the_batch_before_the_first_layer_is_the_batch():
    torch.manual_seed(0)
    model = Model(lambda m, x: m.head(x * m.scale), head=nn.Linear(WIDTH, 2), scale=sized(WIDTH))
    model.first = nn.Identity()
    assert_exact(model, (torch.randn(ROWS, WIDTH),))
