"""Rules over random shapes and options, through a whole model, against the slow loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from per_example import assert_exact

FEW = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float64, torch.float32])
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def seeded(seed):
    torch.manual_seed(seed)
    return seed


def sizes(dims, low, high):
    return st.lists(st.integers(low, high), min_size=dims, max_size=dims).map(tuple)


@st.composite
def convolution(draw, transpose=False):
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    options = {
        "kernel_size": draw(sizes(dims, 1, 3)),
        "stride": draw(sizes(dims, 1, 2)),
        "dilation": draw(sizes(dims, 1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
    if transpose:
        options["padding"] = draw(sizes(dims, 0, 1))
        steps = zip(options["stride"], options["dilation"], strict=True)
        options["output_padding"] = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in steps)
        layer = TRANSPOSED[dims](*channels, **options)
    else:
        options["padding"] = draw(st.one_of(sizes(dims, 0, 2), st.sampled_from(["same", "valid"])))
        options["padding_mode"] = draw(
            st.sampled_from(["zeros", "reflect", "replicate", "circular"])
        )
        assume(options["padding"] != "same" or set(options["stride"]) == {1})
        layer = CONVOLUTIONS[dims](*channels, **options)
    return layer, channels[0], dims


def through(layer, channels, dims, positions):
    """The layer between two others, so that its input has a gradient too."""
    before = CONVOLUTIONS[dims](2, channels, 1)
    return nn.Sequential(before, nn.Tanh(), layer), (torch.randn(4, 2, *positions),)


@pytest.fixture(params=["shifted", "unfolded"])
def form(request, monkeypatch):
    """Both ways to a convolution's weight, whatever its size would choose."""
    least = 1 if request.param == "shifted" else 10**9
    monkeypatch.setattr("noisescale.measure.rules.parts.LEAST_SHIFTED_ELEMENTS", least)
    monkeypatch.setattr("noisescale.measure.rules.parts.LEAST_SHIFTED_POSITIONS", 1)


@pytest.mark.usefixtures("form")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@FEW
@given(given_=convolution(), seed=st.integers(0, 99).map(seeded), dtype=DTYPES)
def test_convolutions(given_, seed, dtype):
    layer, channels, dims = given_
    model, batch = through(layer, channels, dims, (6, 5, 7)[:dims])
    assert_exact(model, batch, dtype=dtype)


@pytest.mark.usefixtures("form")
@FEW
@given(given_=convolution(transpose=True), seed=st.integers(0, 99).map(seeded), dtype=DTYPES)
def test_transposed_convolutions(given_, seed, dtype):
    layer, channels, dims = given_
    positions = (4, 3, 3)[:dims]
    try:
        assume(layer(torch.zeros(1, channels, *positions)).numel() > 0)
    except RuntimeError:
        assume(False)  # an output of no size
    model, batch = through(layer, channels, dims, positions)
    assert_exact(model, batch, dtype=dtype)


def test_an_output_size_given_at_the_call():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2)

        def forward(self, x):
            return self.up(x, output_size=(10, 10))

    torch.manual_seed(0)
    assert_exact(Sized(), (torch.randn(3, 2, 4, 4),))


@FEW
@given(
    mode=st.sampled_from(["sum", "mean"]),
    padding=st.sampled_from([None, 0, 3]),
    length=st.integers(1, 9),
    width=st.integers(1, 6),
    seed=st.integers(0, 99).map(seeded),
    dtype=DTYPES,
)
def test_embedding_bags(mode, padding, length, width, seed, dtype):
    model = nn.Sequential(
        nn.EmbeddingBag(5, width, mode=mode, padding_idx=padding), nn.Linear(width, 2)
    )
    assert_exact(model, (torch.randint(0, 5, (4, length)),), dtype=dtype)


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(5, 3, mode="sum"), nn.Linear(3, 2)

    def forward(self, ids):
        return self.out(self.bag(ids, per_sample_weights=ids.to(self.bag.weight.dtype)))


class Ragged(Weighted):
    def forward(self, ids):
        return self.out(self.bag(ids.flatten(), torch.arange(0, ids.numel(), ids.shape[1])))


@pytest.mark.parametrize("make", [Weighted, Ragged])
def test_bags_of_other_kinds_are_left_out(make):
    torch.manual_seed(0)
    assert_exact(make(), (torch.randint(0, 5, (4, 3)),), left_out={"bag.weight"})


@FEW
@given(
    kind=st.sampled_from(["layer", "rms", "group", "instance"]),
    dims=st.integers(0, 3),
    shape=sizes(2, 2, 3),
    flags=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99).map(seeded),
    dtype=DTYPES,
)
def test_normalisations(kind, dims, shape, flags, seed, dtype):
    # Normalising one or two numbers leaves their gradient nothing but rounding: three at least.
    affine, bias = flags
    positions = (3, 2, 4)[:dims]
    if kind == "layer":
        layer, x = nn.LayerNorm(shape, bias=bias), (*positions, *shape)
    elif kind == "rms":
        layer, x = nn.RMSNorm(shape, eps=1e-6 if affine else None), (*positions, *shape)
    elif kind == "group":
        layer, x = nn.GroupNorm(shape[0], 3 * shape[0]), (3 * shape[0], *positions)
    else:
        assume(dims)
        layer = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1](4, affine=True)
        x = (4, *positions)
    model = nn.Sequential(nn.Linear(x[-1], x[-1]), nn.Tanh(), layer)
    assert_exact(model, (torch.randn(4, *x),), dtype=dtype)


def test_instance_norm_with_running_statistics_is_left_out():
    torch.manual_seed(0)
    layer = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv1d(2, 2, 1), layer)
    source = assert_exact(model, (torch.randn(4, 2, 5),), left_out={"1.weight", "1.bias"})
    assert "running statistics" in source.inventory.missing["1.weight"]


@FEW
@given(
    positions=st.integers(0, 2).flatmap(lambda n: sizes(n, 1, 6)),
    widths=sizes(2, 1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 99).map(seeded),
    dtype=DTYPES,
)
def test_linear(positions, widths, bias, seed, dtype):
    model = nn.Sequential(nn.Linear(3, widths[0]), nn.Tanh(), nn.Linear(*widths, bias=bias))
    assert_exact(model, (torch.randn(5, *positions, 3),), dtype=dtype)
