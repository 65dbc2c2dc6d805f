"""The ways to a convolution's per-example weight gradients agree with each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from noisescale.measure.rules import windows
from noisescale.measure.rules.convolution import weight_part, whole
from noisescale.measure.rules.parts import square_sum, sum_of, total, total_and_square_sum
from noisescale.measure.rules.weighted import coordinate_square_sum, weighted_square_sum
from noisescale.measure.rules.windows import Windows

# Sums of a few hundred products in float32, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
KINDS = {
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


@st.composite
def convolutions(draw):
    dims = draw(st.sampled_from([2, 2, 3]))
    turned = draw(st.booleans())
    groups = draw(st.integers(1, 2))
    kernel = draw(st.integers(2, 3))
    options = {
        "stride": draw(st.integers(1, 2)),
        "dilation": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 1)),
        "groups": groups,
        "bias": False,
    }
    if turned:
        options["output_padding"] = draw(st.integers(0, max(options["stride"], 2) - 1))
        options["output_padding"] = min(
            options["output_padding"], max(options["stride"], options["dilation"]) - 1
        )
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "circular", "reflect"]))
    torch.manual_seed(draw(st.integers(0, 9)))
    layer = KINDS[dims][turned](8 * groups, 7 * groups, kernel, **options)
    x = torch.randn(draw(st.integers(1, 5)), 8 * groups, *[9] * dims)
    return layer, x


def sides(layer, x):
    """The grid and the signal of :func:`weight_part`."""
    g = torch.randn_like(layer(x)).detach()
    return (x, g) if isinstance(layer, _ConvTransposeNd) else (g, x)


@settings(deadline=None, max_examples=40)
@given(convolutions(), st.sampled_from([1, 1 << 12, 1 << 21]))
def test_examples_as_groups_give_what_unfolded_patches_give(case, laid_out):
    layer, x = case
    grid, signal = sides(layer, x)
    shape = layer.weight.shape
    weight = torch.rand(shape)
    before, windows.LAID_OUT = windows.LAID_OUT, laid_out
    try:
        part, slow = weight_part(layer, grid, signal), weight_part(layer, grid, signal, shift=False)
        if isinstance(part, Windows):
            both = total_and_square_sum(part, shape)
            torch.testing.assert_close(both[0], total(slow, shape), **CLOSE)
            torch.testing.assert_close(both[1], square_sum([slow], shape), rtol=1e-5, atol=0)
        torch.testing.assert_close(sum_of([part], shape), sum_of([slow], shape), **CLOSE)
        torch.testing.assert_close(total(part, shape), total(slow, shape), **CLOSE)
        for function in (square_sum, coordinate_square_sum):
            torch.testing.assert_close(
                function([part], shape), function([slow], shape), rtol=1e-4, atol=1e-5
            )
        torch.testing.assert_close(
            weighted_square_sum([part], shape, weight),
            weighted_square_sum([slow], shape, weight),
            rtol=1e-5,
            atol=0,
        )
    finally:
        windows.LAID_OUT = before


def taken(layer, x):
    """Whether the layer's examples become groups."""
    part = weight_part(layer, *sides(layer, x))
    return isinstance(part, Windows) and part.whole


IMAGES = torch.randn(2, 16, 12, 12)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_examples_become_groups_where_that_is_cheap():
    assert taken(nn.Conv2d(16, 16, 3), IMAGES)
    assert taken(nn.Conv2d(16, 16, 3, stride=2, padding=1), IMAGES)
    assert taken(nn.Conv2d(16, 16, 3, padding="same"), IMAGES)
    assert taken(nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), IMAGES)
    assert taken(nn.ConvTranspose2d(16, 16, 3, stride=2, output_padding=1), IMAGES)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 4, padding="same"),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.ConvTranspose2d(16, 16, 3, dilation=2, output_padding=1),
    ],
    ids=["one offset", "more padding behind", "depthwise", "positions to spare"],
)
def test_examples_become_no_groups_elsewhere(layer):
    assert not taken(layer, IMAGES)


def test_examples_become_no_groups_in_double_precision_or_without_onednn(monkeypatch):
    layer = nn.Conv2d(16, 16, 3)
    grid, signal = sides(layer, IMAGES)
    assert not whole(layer, grid.double(), signal.double())
    assert not whole(layer, grid[:0], signal[:0])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not whole(layer, grid, signal)
