"""Weighted and coordinate-wise sums of squares against materialised gradients and slow loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from noisescale.measure.drawn import Draw
from noisescale.measure.examples import ExamplesSource
from noisescale.measure.gradients import Inventory, StepNorms
from noisescale.measure.metric import Metric
from noisescale.measure.rules import parts as parts_module
from noisescale.measure.rules.parts import Outer, Rows, sum_of
from noisescale.measure.rules.weighted import coordinate_square_sum, weighted_square_sum
from noisescale.measure.rules.windows import Windows
from per_example import TOLERANCE, cross_entropy, mean_square
from reference import per_example_gradients
from tied_models import Mixed, Repeated, TiedHead

FEW = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float64, torch.float32])
WEIGHT = torch.Size([6, 4])


def outer(generator, length, groups=1):
    o, i = WEIGHT[0] // groups, WEIGHT[1]
    draw = lambda width: torch.randn(5 * groups, length, width, generator=generator)  # noqa: E731
    return Outer(draw(o).double(), draw(i).double(), groups)


def rows(generator, length):
    ids = torch.randint(0, WEIGHT[0], (5, length), generator=generator)
    return Rows(ids, torch.randn(5, length, WEIGHT[1], generator=generator).double(), WEIGHT[0])


def part(kind, generator, length, groups):
    if kind == "dense":
        return torch.randn(5, *WEIGHT, generator=generator).double()
    return rows(generator, length) if kind == "rows" else outer(generator, length, groups)


@FEW
@given(
    kinds=st.lists(st.sampled_from(["dense", "rows", "outer"]), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    groups=st.sampled_from([1, 2]),
    room=st.sampled_from([1, 50, 1 << 19]),
    seed=st.integers(0, 99),
)
def test_every_kind_of_part_and_their_cross_terms(kinds, lengths, groups, room, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [part(k, generator, n, groups) for k, n in zip(kinds, lengths, strict=False)]
    weight = torch.rand(WEIGHT, generator=generator).double()
    squares = sum_of(parts, WEIGHT).square().sum(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "PRODUCT_ELEMENTS", room)
        patch.setattr(parts_module, "CHUNK_ELEMENTS", room)
        torch.testing.assert_close(coordinate_square_sum(parts, WEIGHT), squares)
        found = weighted_square_sum(parts, WEIGHT, weight)
    torch.testing.assert_close(found, (squares * weight).sum())


def test_parts_are_left_as_they_were():
    """Squares are taken in place in buffers, never in what the rules hand over."""
    generator = torch.Generator().manual_seed(0)
    for kind in ("dense", "rows", "outer"):
        for length in (1, 3):
            one = part(kind, generator, length, 1)
            before = sum_of([one], WEIGHT).clone()
            weighted_square_sum([one], WEIGHT, torch.rand(WEIGHT).double())
            coordinate_square_sum([one], WEIGHT)
            assert torch.equal(sum_of([one], WEIGHT), before)


class Weighted(Metric):
    """Fixed weights, by parameter."""

    name = "weighted"

    def __init__(self, weights, examples=None):
        self.weights, self.examples = weights, examples

    def freeze(self):
        pass

    def sample(self, calls):
        if self.examples is None:
            return None
        return Draw(self.examples, torch.ones(len(self.examples)))

    def square(self, index, gradient):
        return (self.weights[index] * gradient.detach().square()).sum()

    def square_sum(self, index, parts, shape):
        return weighted_square_sum(parts, shape, self.weights[index])


class Squares(Weighted):
    """Keeps coordinate-wise sums."""

    def square_sum(self, index, parts, shape):
        squares = coordinate_square_sum(parts, shape)
        self.weights[index] = self.weights[index] + squares
        return squares.sum()


def assert_weighted(model, batch, loss, dtype=torch.float64):
    model = model.to(dtype)
    batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)
    truth = per_example_gradients(model, loss, batch)
    inventory = Inventory(model)
    draw = torch.Generator().manual_seed(3)
    weights = [torch.rand(s.tensor.shape, generator=draw).to(dtype) for s in inventory.slots]
    zeros = [torch.zeros_like(s.tensor) for s in inventory.slots]
    some = torch.tensor([2, 0])
    for metric, chosen in (
        (Weighted(weights), slice(None)),
        (Weighted(weights, some), some),
        (Squares(zeros), slice(None)),
    ):
        source = ExamplesSource(model, inventory, metric=metric)
        source.open()
        loss(model, batch).backward()
        norms = source.close()
        source.detach()
        model.zero_grad()
        assert isinstance(norms, StepNorms), norms
        for i, gradients in enumerate(truth.values()):
            squares = gradients[chosen].square().sum(0)
            floor = 1e-20 if dtype == torch.float64 else 1e-9
            if isinstance(metric, Squares):
                found = zeros[i].double() * norms.weighted_factor
                scale = float(squares.max())
                limit = TOLERANCE[dtype] * scale + floor
                assert torch.allclose(found, squares, rtol=TOLERANCE[dtype], atol=limit)
            else:
                expected = float((squares * weights[i].double()).sum())
                real = float(norms.weighted[i]) * norms.weighted_factor
                assert real == pytest.approx(expected, rel=TOLERANCE[dtype], abs=floor)


@FEW
@given(
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    length=st.integers(0, 5),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_linear_and_layer_norm(widths, length, seed, dtype):
    torch.manual_seed(seed)
    inner, outer_width = widths
    norm = nn.LayerNorm(outer_width) if outer_width > 3 else nn.Identity()
    model = nn.Sequential(nn.Linear(inner, outer_width), norm, nn.Tanh(), nn.Linear(outer_width, 2))
    shape = (length, inner) if length else (inner,)
    assert_weighted(model, (torch.randn(4, *shape),), mean_square, dtype)


@FEW
@given(
    channels=st.sampled_from([(1, 2), (2, 4), (4, 4)]),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    size=st.integers(5, 9),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_convolutions(channels, groups, kernel, stride, dilation, size, seed, dtype):
    torch.manual_seed(seed)
    groups = groups if channels[0] % groups == 0 else 1
    layer = nn.Conv2d(*channels, kernel, stride, 1, dilation, groups)
    model = nn.Sequential(layer, nn.Tanh())
    assert_weighted(model, (torch.randn(4, channels[0], size, size),), mean_square, dtype)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1), (4, 6, 6)),
        (nn.Conv1d(4, 4, 5, padding=2), (4, 40)),
        (nn.Conv3d(2, 2, 2), (2, 4, 4, 4)),
        (nn.GroupNorm(2, 4), (4, 3)),
        (nn.LSTM(3, 4, batch_first=True), (5, 3)),
        (nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), (5, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_layers(layer, shape):
    torch.manual_seed(0)
    assert_weighted(layer, (torch.randn(4, *shape),), mean_square)


def test_windows_are_used_by_some_convolution():
    """The faster path is under test above."""
    layer, seen = nn.Conv2d(4, 4, 3, padding=1), []

    class Spy(Weighted):
        def square_sum(self, index, parts, shape):
            seen.extend(type(part) for part in parts)
            return super().square_sum(index, parts, shape)

    source = ExamplesSource(layer, Inventory(layer), metric=Spy([torch.ones(4, 4, 3, 3), *[0] * 1]))
    source.inventory.drop(1, "not needed")
    source.open()
    layer(torch.randn(3, 4, 17, 17)).sum().backward()
    source.close()
    source.detach()
    assert Windows in seen


@FEW
@given(
    vocabulary=st.integers(2, 30),
    width=st.integers(1, 8),
    length=st.integers(1, 8),
    padding=st.sampled_from([None, 1]),
    twice=st.booleans(),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_tied_head(vocabulary, width, length, padding, twice, seed, dtype):
    torch.manual_seed(seed)
    ids = torch.randint(0, vocabulary, (4, length + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    assert_weighted(TiedHead(vocabulary, width, padding, twice), batch, cross_entropy, dtype)


@FEW
@given(
    kinds=st.lists(st.sampled_from(["linear", "again", "table"]), max_size=3),
    length=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_any_pattern_of_tying(kinds, length, seed):
    torch.manual_seed(seed)
    batch = torch.randn(4, length, 6), torch.randint(0, 6, (4, length))
    assert_weighted(Mixed(kinds), batch, mean_square)


def test_a_module_used_twice():
    torch.manual_seed(0)
    assert_weighted(
        Repeated(nn.Conv2d(2, 2, 3, padding=1), 2), (torch.randn(4, 2, 6, 6),), mean_square
    )
    assert_weighted(Repeated(nn.Linear(4, 4), 3), (torch.randn(4, 4),), mean_square)
