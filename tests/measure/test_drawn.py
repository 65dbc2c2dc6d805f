"""Draws of a few examples, against the exact expectation over where the draw starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noisescale.measure.drawn import draw, sizes
from noisescale.measure.rules.registry import Call

GRID = 4000
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def expected_total(bounds: torch.Tensor, most: int, values: torch.Tensor) -> float:
    """Mean of the estimate over evenly spaced starts."""
    found = []
    for start in (np.arange(GRID) + 0.5) / GRID:
        drawn = draw(bounds, most, float(start))
        assert len(drawn.examples) == most
        found.append(float((values[drawn.examples] * drawn.scale**2).sum()))
    return float(np.mean(found))


@pytest.mark.parametrize("most", [1, 5, 19])
@pytest.mark.parametrize("kind", ["skewed", "equal", "some zero", "one not finite", "all zero"])
def test_the_expectation_is_the_sum_over_all(most, kind):
    generator = torch.Generator().manual_seed(3)
    bounds = torch.rand(20, generator=generator, dtype=torch.float64) ** 6
    if kind == "equal":
        bounds = torch.ones(20)
    if kind == "some zero":
        bounds[::2] = 0
    if kind == "one not finite":
        bounds[4] = torch.inf
    if kind == "all zero":
        bounds = torch.zeros(20)
    values = torch.rand(20, generator=generator, dtype=torch.float64) + 0.1
    found = expected_total(bounds, most, values)
    # A grid of starts misplaces each of 20 ends by half a cell at most; no weight is above
    # 10 N / most = 200 / most.
    cell = 20 * 200 / most * float(values.max()) / GRID
    assert found == pytest.approx(float(values.sum()), abs=cell)


@FEW
@given(count=st.integers(2, 60), power=st.floats(0, 8), seed=st.integers(0, 99))
def test_no_example_weighs_more_than_ten_times_a_uniform_draw(count, power, seed):
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.rand(count, generator=generator, dtype=torch.float64) ** power
    most = max(1, count // 3)
    drawn = draw(bounds, most, 0.37)
    assert float((drawn.scale**2).max()) <= 10 * count / most * (1 + 1e-9)
    assert bool((drawn.scale**2 >= 1 - 1e-9).all()) or count < 4


@FEW
@given(seed=st.integers(0, 99), positions=st.integers(1, 5))
def test_no_gradient_is_larger_than_its_bound(seed, positions):
    torch.manual_seed(seed)
    layer = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(6, positions, 4, dtype=torch.float64)
    g = torch.randn(6, positions, 3, dtype=torch.float64)
    call = Call(layer, [0], tensors=[x], gradients=[g])
    true = torch.einsum("bto,bti->boi", g, x).square().flatten(1).sum(1)
    assert bool((sizes(call, {}) >= true * (1 - 1e-6)).all())


@pytest.mark.parametrize("kind", ["linear", "sequence", "convolution"])
def test_weights_that_are_an_outer_product_are_bounded_exactly(kind):
    torch.manual_seed(1)
    rows, columns = torch.rand(3) + 0.1, torch.rand(4) + 0.1
    weight = rows[:, None] * columns
    if kind == "convolution":
        layer, x, g = nn.Conv1d(4, 3, 1), torch.randn(5, 4, 7), torch.randn(5, 3, 7)
        weight = weight.unsqueeze(2)
        seen = x.square().sum(2) @ columns, g.square().sum(2) @ rows
    else:
        shape = (5, 7) if kind == "sequence" else (5,)
        layer, x, g = nn.Linear(4, 3), torch.randn(*shape, 4), torch.randn(*shape, 3)
        seen = [(t.square() @ v).flatten(1).sum(1) if t.dim() > 2 else t.square() @ v
                for t, v in ((x, columns), (g, rows))]  # fmt: skip
    call = Call(layer, [0], tensors=[x], gradients=[g])
    torch.testing.assert_close(
        sizes(call, {"weight": weight}), (seen[0] * seen[1]).double(), rtol=1e-5, atol=0
    )
    with_bias = sizes(call, {"weight": weight, "bias": rows})
    torch.testing.assert_close(with_bias, ((seen[0] + 1) * seen[1]).double(), rtol=1e-5, atol=0)


def test_drawn_gradients_are_scaled_along_their_own_batch_dimension():
    call = Call(nn.GRU(2, 2), [1], outputs=[1])
    call.tensors, call.gradients = [torch.ones(3, 4, 2)], [torch.ones(3, 4, 2)]
    drawn = draw(torch.ones(4), 2, 0.5)
    few = drawn.take(call)
    assert few.gradient.shape == (3, 2, 2)
    torch.testing.assert_close(few.gradient, torch.full((3, 2, 2), 2.0**0.5))
