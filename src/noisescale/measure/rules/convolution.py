"""Convolutions and transposed convolutions of one to three dimensions."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from noisescale.measure.rules import parts as _parts
from noisescale.measure.rules.parts import Outer, Part, wide
from noisescale.measure.rules.registry import example_rule, trained
from noisescale.measure.rules.windows import Windows


def _batched(layer: nn.Module, x: Tensor) -> bool:
    assert isinstance(layer, _ConvNd)
    return x.dim() == len(layer.kernel_size) + 2


def _step(layer: nn.Module, x: Tensor, g: Tensor) -> int:
    """Examples whose patches fill one buffer; shifted products divide them by themselves."""
    assert isinstance(layer, _ConvNd)
    if isinstance(layer, _ConvTransposeNd):
        x, g = g, x
    one_by_one = shifted(layer, prod(g.shape[2:])) or whole(layer, wide(g), wide(x))
    return max(1, len(x)) if one_by_one else unfolded_step(layer, g)


def unfolded_step(layer: _ConvNd, g: Tensor) -> int:
    """Examples whose patches fill one buffer."""
    per_example = layer.weight[0].numel() * layer.groups * prod(g.shape[2:])
    return max(1, _parts.CHUNK_ELEMENTS // max(1, per_example))


# Nanoseconds per position and offset of the kernel: a product with a shifted input takes as long
# as one with NARROW columns at least; patches are written, one element after the other, and make
# one wide product. (measured: benchmarks/cost_model.py)
_NARROW = 10
_PER_SHIFTED, _PER_ELEMENT, _PER_UNFOLDED = 1 / 20, 2.3, 1 / 40


def shifted(layer: _ConvNd, positions: int) -> bool:
    """Whether products with shifted inputs are cheaper than unfolded patches."""
    outer, inner = layer.weight.shape[:2]
    if isinstance(layer, _ConvTransposeNd):
        outer //= layer.groups
    overlaps = any(k > s for k, s in zip(layer.kernel_size, layer.stride, strict=True))
    by_shift = outer * max(inner, _NARROW) * _PER_SHIFTED
    by_patches = inner * (_PER_ELEMENT + outer * _PER_UNFOLDED)
    return (
        overlaps
        and by_shift <= by_patches
        and positions >= _parts.LEAST_SHIFTED_POSITIONS
        and inner * positions >= _parts.LEAST_SHIFTED_ELEMENTS
    )


# Fewest channels on either side that are worth a kernel of their own per example, and how many
# times the operations of the products Gram matrices must cost. (measured on one thread)
_LEAST_WHOLE = 6
_WHOLE_MARGIN = 1.2


def whole(layer: _ConvNd, grid: Tensor, signal: Tensor) -> bool:
    """Whether torch's own weight gradient, with examples as groups, is the cheapest.

    oneDNN then takes 0.4 to 0.9 times as long as shifted products do; other backends take group
    by group.

    Args:
        layer: the convolution.
        grid: as in :func:`weight_part`.
        signal: likewise.
    """
    outer, inner = grid.shape[1] // layer.groups, signal.shape[1] // layer.groups
    kernel, positions = prod(layer.kernel_size), prod(grid.shape[2:])
    widths = _pad_widths(layer)
    return (
        grid.device.type == "cpu"
        and grid.dtype == signal.dtype == torch.float32
        and len(layer.kernel_size) > 1 < kernel
        and min(outer, inner) >= _LEAST_WHOLE
        and positions * (outer + inner * kernel) >= _WHOLE_MARGIN * outer * inner * kernel
        and _has_onednn()
        and len(grid) > 0
        # As many zeros behind as before, and as many positions as torch's convolution has.
        and widths[::2] == widths[1::2]
        and grid_shape(layer, signal.shape[2:], widths[::2][::-1]) == grid.shape[2:]
    )


def _has_onednn() -> bool:
    backend: Any = torch.backends.mkldnn
    return bool(backend.is_available() and backend.enabled)


def grid_shape(layer: _ConvNd, extent: torch.Size, padding: list[int]) -> torch.Size:
    """Positions of the kernel in a signal of this extent."""
    spans = zip(layer.kernel_size, layer.dilation, strict=True)
    rooms = [
        n + 2 * p - d * (k - 1) - 1 for n, p, (k, d) in zip(extent, padding, spans, strict=True)
    ]
    return torch.Size(room // s + 1 for room, s in zip(rooms, layer.stride, strict=True))


_OPTIONS: dict[str, Any] = {"batched": _batched, "step": _step}


@example_rule(nn.Conv1d, **_OPTIONS)
@example_rule(nn.Conv2d, **_OPTIONS)
@example_rule(nn.Conv3d, **_OPTIONS)
def convolution(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Part]:
    """Convolution with groups, stride, dilation and any padding: a Linear on its patches."""
    assert isinstance(layer, _ConvNd)
    x, g = wide(x), wide(g)
    found: dict[str, Part] = {}
    if trained(layer, "weight"):
        found["weight"] = weight_part(layer, g, x)
    if trained(layer, "bias"):
        found["bias"] = g.flatten(2).sum(2)
    return found


@example_rule(nn.ConvTranspose1d, more_inputs=True, **_OPTIONS)
@example_rule(nn.ConvTranspose2d, more_inputs=True, **_OPTIONS)
@example_rule(nn.ConvTranspose3d, more_inputs=True, **_OPTIONS)
def transposed(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Part]:
    """Transposed convolution: input and output change places, so patches are the gradient's."""
    assert isinstance(layer, _ConvTransposeNd)
    x, g = wide(x), wide(g)
    found: dict[str, Part] = {}
    if trained(layer, "weight"):
        found["weight"] = weight_part(layer, x, g)
    if trained(layer, "bias"):
        found["bias"] = g.flatten(2).sum(2)
    return found


def weight_part(layer: _ConvNd, grid: Tensor, signal: Tensor, *, shift: bool | None = None) -> Part:
    """The weight's gradients, from one tensor per position and one that the kernel slides over.

    Args:
        layer: the convolution.
        grid: the output's gradient, or a transposed convolution's input.
        signal: the input, or a transposed convolution's output's gradient.
        shift: whether by shifted products rather than unfolded patches; default: the cheapest
            of these and :func:`whole`.
    """
    in_one = shift is None and whole(layer, grid, signal)
    if not in_one and not (shifted(layer, prod(grid.shape[2:])) if shift is None else shift):
        return _outer(layer, grid, _patches(layer, signal, grid.shape[2:]))
    before = list(reversed(_pad_widths(layer)[::2]))
    if layer.padding_mode != "zeros" and any(before):
        signal, before = _padded(layer, signal, _pad_widths(layer)), [0] * len(before)
    return Windows(
        grid,
        signal,
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        dilation=tuple(layer.dilation),
        padding=tuple(before),
        groups=layer.groups,
        whole=in_one,
    )


def _outer(layer: _ConvNd, channels: Tensor, patches: Tensor) -> Outer:
    """Positions against patches: (n, c, *positions) and (n, channels * kernel, positions)."""
    items = len(channels) * layer.groups
    positions = prod(channels.shape[2:])
    left = channels.reshape(items, channels.shape[1] // layer.groups, positions)
    right = patches.reshape(items, patches.shape[1] // layer.groups, positions)
    return Outer(left.mT, right.mT, layer.groups)


def _patches(layer: _ConvNd, x: Tensor, positions: Any) -> Tensor:
    """Pad and unfold to (batch, channels * kernel, positions)."""
    size, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    widths = _pad_widths(layer)
    if prod(size) == 1:
        steps = (slice(0, (p - 1) * s + 1, s) for p, s in zip(positions, stride, strict=True))
        return _padded(layer, x, widths)[(slice(None), slice(None), *steps)]
    if len(size) == 2 and not isinstance(layer, _ConvTransposeNd):
        # F.unfold pads with zeros by itself, the same on both sides.
        padding = (widths[2], widths[0])
        if layer.padding_mode == "zeros" and padding == (widths[3], widths[1]):
            return F.unfold(x, size, dilation=dilation, padding=padding, stride=stride)
        return F.unfold(_padded(layer, x, widths), size, dilation=dilation, stride=stride)
    windows = _padded(layer, x, widths)
    for axis, (k, d, s) in enumerate(zip(size, dilation, stride, strict=True), start=2):
        windows = windows.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
        # An output wider than its positions need (output_padding) has windows to spare.
        windows = windows.narrow(axis, 0, positions[axis - 2])
    axes = range(2, 2 + len(size))
    kernel_first = windows.permute(0, 1, *(a + len(size) for a in axes), *axes)
    return kernel_first.reshape(len(x), x.shape[1] * prod(size), prod(positions))


def _padded(layer: _ConvNd, x: Tensor, widths: list[int]) -> Tensor:
    if not any(widths):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, widths, mode=mode)


def _pad_widths(layer: _ConvNd) -> list[int]:
    """Padding in the order of ``F.pad``: last dimension first."""
    widths: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "valid":
            widths += [0, 0]
        elif isinstance(layer.padding, str):
            whole = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            widths += [whole // 2, whole - whole // 2]
        else:
            widths += [int(layer.padding[axis])] * 2
    return widths
