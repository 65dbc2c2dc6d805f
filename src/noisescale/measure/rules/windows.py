"""A convolution's weight gradients, kernel offset by kernel offset.

For one offset of the kernel the gradient is a plain product of the output's gradient with the
input shifted by that offset. Laid out flat with rows of equal width, a shifted input is a slice
of the same memory: nothing is unfolded. A stride splits the input into phases, each of which is
shifted by whole positions. Where torch has fast kernels for it, the examples are handed to the
convolution's own backward pass as groups of one example instead, which gives all offsets at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from noisescale.measure.rules.scratch import buffers
from noisescale.measure.squares import squared_norm

# Elements that are laid out at a time. (measured)
LAID_OUT = 1 << 21


@dataclass(frozen=True, eq=False)
class Windows:
    """Gradients whose block at kernel offset k is sum_p grid_p signal_(p stride + k dilation)^T.

    Attributes:
        grid: shape (examples, channels, *positions).
        signal: shape (examples, channels, *extent); outside there are zeros.
        kernel: offsets per dimension.
        stride: steps of the positions in the signal.
        dilation: steps of the offsets in the signal.
        padding: zeros before the signal; what it lacks behind is added.
        groups: blocks that the channels of both fall into.
        whole: whether all offsets come from one call, with the examples as groups: torch's own
            convolution of the signal must have the grid's positions.
    """

    grid: Tensor
    signal: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int = 1
    whole: bool = False

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.grid)

    def cut(self, rows: slice) -> Windows:
        """Some of the examples."""
        return replace(self, grid=self.grid[rows], signal=self.signal[rows])

    @cached_property
    def _widths(self) -> tuple[int, ...]:
        """Positions per dimension, with room for the largest shift."""
        spans = zip(self.grid.shape[2:], self.kernel, self.dilation, self.stride, strict=True)
        return tuple(p + (k - 1) * d // s for p, k, d, s in spans)

    @cached_property
    def _blocks(self) -> list[tuple[tuple[int, ...], int]]:
        """Phase and flat shift of every kernel offset, in row-major order."""
        rows = [prod(self._widths[i + 1 :]) for i in range(len(self.kernel))]
        dims = zip(self.kernel, self.dilation, self.stride, strict=True)
        offsets = [[divmod(i * d, s) for i in range(k)] for k, d, s in dims]
        return [
            (
                tuple(phase for _, phase in offset),
                sum(row * shift for row, (shift, _) in zip(rows, offset, strict=True)),
            )
            for offset in itertools.product(*offsets)
        ]

    def products(self) -> Iterator[tuple[slice, int, Tensor]]:
        """Yield (examples, offset, block) with blocks of shape (examples * groups, o, i).

        The block's memory is used again for the next one.
        """
        phases = list(dict.fromkeys(phase for phase, _ in self._blocks))
        # The last shifted slice runs past the last row by less than one row.
        spare = (self._widths[0] + (len(self._widths) > 1), *self._widths[1:])
        flat = (self.grid.shape[2], *self._widths[1:])
        outer, inner = self.grid.shape[1], self.signal.shape[1]
        each = outer * prod(flat) + len(phases) * inner * prod(spare)
        step = min(self.examples, max(1, LAID_OUT // each))
        shapes = (
            (step, outer, *flat),
            *((step, inner, *spare) for _ in phases),
            (step * self.groups, outer // self.groups, inner // self.groups),
        )
        with buffers(self.grid, *shapes) as (left, *right, block):
            for padded in (left, *right):
                padded.zero_()
            for start in range(0, self.examples, step):
                rows = slice(start, min(start + step, self.examples))
                n = rows.stop - rows.start
                inside = [slice(p) for p in self.grid.shape[2:]]
                left[(slice(n), slice(None), *inside)] = self.grid[rows]
                for phase, padded in zip(phases, right, strict=True):
                    self._lay_out(padded[:n], self.signal[rows], phase)
                grid = self._split(left[:n])
                signals = {p: self._split(t[:n]) for p, t in zip(phases, right, strict=True)}
                out = block[: n * self.groups]
                for offset, (phase, shift) in enumerate(self._blocks):
                    shifted = signals[phase][:, :, shift : shift + grid.shape[2]]
                    yield rows, offset, torch.bmm(grid, shifted.mT, out=out)

    def gradients(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (examples, their gradients), shape (some, o, i / groups, *kernel).

        Source: as vmap's rule for a convolution's weight: examples are independent groups.
        """
        outer, inner = self.grid.shape[1], self.signal.shape[1] // self.groups
        each = max(self.grid[0].numel() + self.signal[0].numel(), outer * inner * prod(self.kernel))
        step = max(1, LAID_OUT // max(1, each))
        for start in range(0, self.examples, step):
            rows = slice(start, min(start + step, self.examples))
            grid, signal = self.grid[rows], self.signal[rows]
            n = len(grid)
            # Its shape alone is used.
            weight = grid.new_empty(1).expand(n * outer, inner, *self.kernel)
            _, found, _ = torch.ops.aten.convolution_backward(
                grid.reshape(1, -1, *grid.shape[2:]),
                signal.reshape(1, -1, *signal.shape[2:]),
                weight,
                None,
                self.stride,
                self.padding,
                self.dilation,
                False,
                [0] * len(self.stride),
                n * self.groups,
                [False, True, False],
            )
            yield rows, found.view(n, outer, inner, *self.kernel)

    def _lay_out(self, padded: Tensor, signal: Tensor, phase: tuple[int, ...]) -> None:
        """Copy the signal's positions j * stride + phase - padding to j."""
        into, taken = [slice(None)] * 2, [slice(None)] * 2
        dims = zip(
            signal.shape[2:], padded.shape[2:], phase, self.stride, self.padding, strict=True
        )
        for extent, room, residue, stride, before in dims:
            first = max(0, -(-(before - residue) // stride))
            start = first * stride + residue - before
            count = max(0, min(room - first, -(-(extent - start) // stride)))
            into.append(slice(first, first + count))
            taken.append(slice(start, start + count * stride, stride))
        padded[tuple(into)] = signal[tuple(taken)]

    def _split(self, tensor: Tensor) -> Tensor:
        n, channels = tensor.shape[:2]
        return tensor.view(n * self.groups, channels // self.groups, -1)

    def dense(self, shape: torch.Size) -> Tensor:
        """Gradient of every example: shape (examples, *shape)."""
        if self.whole:
            return torch.cat([found for _, found in self.gradients()]).view(-1, *shape)
        out = self.grid.new_empty(self.examples, *shape[:2], prod(self.kernel))
        for rows, offset, block in self.products():
            out[rows, ..., offset] = block.view(-1, *shape[:2])
        return out.view(self.examples, *shape)

    def square_sum(self) -> Tensor:
        """Sum over the examples of the squared norm."""
        found = self.gradients() if self.whole else self.products()
        return torch.stack([squared_norm(block) for *_, block in found]).sum()

    def total(self, shape: torch.Size) -> Tensor:
        """Gradient summed over the examples: the parameter's shape."""
        return self.total_and_square_sum(shape)[0]

    def total_and_square_sum(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Both of them, forming every product once."""
        sums: list[Tensor] = []
        if self.whole:
            whole = self.grid.new_zeros(shape)
            for _, found in self.gradients():
                sums.append(squared_norm(found))
                whole += found.sum(0).view(shape)
            return whole, torch.stack(sums).sum()
        total = self.grid.new_zeros(prod(self.kernel), *shape[:2])
        for _, offset, block in self.products():
            sums.append(squared_norm(block))
            total[offset] += block.view(-1, *shape[:2]).sum(0)
        return total.permute(1, 2, 0).reshape(shape), torch.stack(sums).sum()
