"""A convolution's weight gradients, kernel offset by kernel offset.

For one offset of the kernel the gradient is a plain product of the output's gradient with the
input shifted by that offset. Laid out flat with rows of equal width, a shifted input is a slice
of the same memory: nothing is unfolded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from noisescale.measure.squares import squared_norm


@dataclass(frozen=True, eq=False)
class Windows:
    """Gradients whose block at kernel offset k is sum_t left_t right_(t + shift_k)^T.

    Attributes:
        left: shape (examples * groups, o, t), zero where the positions are padding.
        right: one tensor (examples * groups, i, at least t + shift) per phase of the stride.
        blocks: phase and shift of every kernel offset, in row-major order.
        groups: diagonal blocks of the weight; an example's blocks are adjacent.
    """

    left: Tensor
    right: tuple[Tensor, ...]
    blocks: tuple[tuple[int, int], ...]
    groups: int = 1

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.left) // self.groups

    def cut(self, rows: slice) -> Windows:
        """Some of the examples."""
        items = slice(rows.start * self.groups, rows.stop * self.groups)
        right = tuple(phase[items] for phase in self.right)
        return Windows(self.left[items], right, self.blocks, self.groups)

    def products(self) -> Iterator[Tensor]:
        """Yield every block, shape (examples * groups, o, i), in one buffer that is reused."""
        length = self.left.shape[2]
        items, outer, inner = len(self.left), self.left.shape[1], self.right[0].shape[1]
        buffer = self.left.new_empty(items, outer, inner)
        for phase, shift in self.blocks:
            shifted = self.right[phase][:, :, shift : shift + length]
            yield torch.bmm(self.left, shifted.mT, out=buffer)

    def dense(self, shape: torch.Size) -> Tensor:
        """Gradient of every example: shape (examples, *shape)."""
        blocks = [block.reshape(self.examples, *shape[:2]).clone() for block in self.products()]
        return torch.stack(blocks, dim=-1).reshape(self.examples, *shape)

    def square_sum(self) -> Tensor:
        """Sum over the examples of the squared norm."""
        return torch.stack([squared_norm(block) for block in self.products()]).sum()

    def totals(self, shape: torch.Size) -> Tensor:
        """Gradient summed over the examples: the parameter's shape."""
        sums = [block.view(self.examples, *shape[:2]).sum(0) for block in self.products()]
        return torch.stack(sums, dim=-1).reshape(shape)


def windows(
    positions: Tensor,
    signal: Tensor,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Windows:
    """Lay out a correlation: position p meets ``signal`` at p * stride + k * dilation - padding.

    Args:
        positions: shape (n, channels, *grid).
        signal: shape (n, channels, *extent); beyond it there are zeros.
        kernel: offsets per dimension.
        stride: steps of the positions in the signal.
        dilation: steps of the offsets in the signal.
        padding: zeros before the signal; what it lacks behind is added.
        groups: blocks that the channels of both fall into.
    """
    grid = positions.shape[2:]
    dims = range(len(grid))
    reach = [(kernel[i] - 1) * dilation[i] // stride[i] for i in dims]
    widths = [grid[i] + reach[i] for i in dims]
    row = [prod(widths[i + 1 :]) for i in dims]
    # The last shifted slice runs past the last row by less than one row.
    spare = [widths[0] + (len(grid) > 1), *widths[1:]]
    offsets = [[divmod(k * dilation[i], stride[i]) for k in range(kernel[i])] for i in dims]
    phases: dict[tuple[int, ...], int] = {}
    blocks = []
    for offset in itertools.product(*offsets):
        shift = sum(row[i] * offset[i][0] for i in dims)
        phase = tuple(residue for _, residue in offset)
        blocks.append((phases.setdefault(phase, len(phases)), shift))
    padded = _placed(signal, [w * s for w, s in zip(spare, stride, strict=True)], padding)
    right = [
        padded[_box(slice(r, None, s) for r, s in zip(phase, stride, strict=True))]
        for phase in phases
    ]
    left = _placed(positions, [grid[0], *widths[1:]], [0] * len(grid))
    return Windows(
        _split(left, groups), tuple(_split(t, groups) for t in right), tuple(blocks), groups
    )


def _placed(signal: Tensor, extent: Sequence[int], before: Sequence[int]) -> Tensor:
    """Copy into zeros of another extent, cropped where it is smaller."""
    if tuple(extent) == tuple(signal.shape[2:]) and not any(before):
        return signal.contiguous()
    out = signal.new_zeros(*signal.shape[:2], *extent)
    room = [max(0, e - b) for e, b in zip(extent, before, strict=True)]
    taken = [min(r, n) for r, n in zip(room, signal.shape[2:], strict=True)]
    into = _box(slice(b, b + n) for b, n in zip(before, taken, strict=True))
    out[into] = signal[_box(slice(0, n) for n in taken)]
    return out


def _box(slices: Iterable[slice]) -> tuple[slice, ...]:
    return (slice(None), slice(None), *slices)


def _split(tensor: Tensor, groups: int) -> Tensor:
    n, channels = tensor.shape[:2]
    return tensor.reshape(n * groups, channels // groups, -1)
