"""Mode ``sketch``: squared norms by random signs where the norms themselves are dear."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from noisescale.measure.metric import Euclidean
from noisescale.measure.rules.parts import Outer, Part, forms_products, square_sum
from noisescale.measure.rules.windows import Windows

# Output channels from which on one random combination of them is cheaper than all. (assumed)
_LEAST_OUTER = 8


class Sketched(Euclidean):
    """Plain squares, estimated without bias for weights used at many positions.

    An example's gradient of such a weight is a matrix M (o x i), a sum over positions. With
    independent random signs r for every example and step, E|r^T M|^2 = |M|_F^2, and r^T M needs
    o times less work than M. The variance is 2 (|M M^T|_F^2 - sum_a (M M^T)_aa^2), at most
    2 |M|_F^4, reached where M has rank 1 and many rows; signs are drawn anew at every step, so
    that the differences between steps, of which intervals are made, hold it too.

    Args:
        seed: of the signs' own random state.

    Source: Hutchinson 1990 (tr of M M^T by random signs), its variance ibid.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def square_sum(self, index: int, parts: Sequence[Part], shape: torch.Size) -> Tensor:
        """Return an unbiased estimate of the sum over examples of sum g_i^2."""
        del index
        if len(parts) == 1:
            return square_sum([self._contracted(parts[0])], shape)
        # Uses of one parameter would need the same signs: they are summed exactly.
        return square_sum(parts, shape)

    def _contracted(self, part: Part) -> Part:
        """Replace the output channels of every example by one random combination of them."""
        if isinstance(part, Outer):
            _, length, outer = part.left.shape
            if outer >= _LEAST_OUTER and forms_products(length, outer, part.right.shape[2]):
                signs = self._signs(len(part.left), outer, part.left)
                # A row times a transposed matrix is ten times faster than a matrix times a
                # column. (measured)
                row = torch.bmm(signs.unsqueeze(1), part.left.mT)
                return replace(part, left=row.mT)
        if isinstance(part, Windows):
            n, channels = part.grid.shape[:2]
            outer = channels // part.groups
            if outer >= _LEAST_OUTER:
                flat = part.grid.reshape(n * part.groups, outer, -1)
                row = torch.bmm(self._signs(len(flat), outer, flat).unsqueeze(1), flat)
                grid = row.view(n, part.groups, *part.grid.shape[2:])
                if set(part.stride) == {1}:
                    return _one_channel(part, grid)
                return replace(part, grid=grid, whole=False)
        return part

    def _signs(self, items: int, outer: int, like: Tensor) -> Tensor:
        drawn = torch.randint(0, 2, (items, outer), generator=self._generator, dtype=torch.int8)
        return (2 * drawn - 1).to(like.device, like.dtype)

    def notes(self) -> list[str]:
        """Say what a reader of the record must know of the norm."""
        return ["per-example norms are sketched: unbiased, their noise is in the interval"]

    def state_dict(self) -> dict[str, Any]:
        """Return the signs' random state."""
        return {"signs": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the signs where they were."""
        if "signs" in state:
            self._generator.set_state(state["signs"].cpu())


def _one_channel(part: Windows, grid: Tensor) -> Outer:
    """Shift the one channel there is, rather than all of the signal's.

    Args:
        part: a convolution of stride 1.
        grid: shape (examples, groups, *positions).

    Returns:
        Gradients of shape (kernel, i) per group, their kernel offsets in reverse order.
    """
    extent = part.signal.shape[2:]
    n, groups = grid.shape[:2]
    dims = range(len(extent))
    # Position q of the signal meets position q + padding - k dilation of the grid.
    last = [(part.kernel[i] - 1) * part.dilation[i] for i in dims]
    padded = grid.new_zeros(n, groups, *(extent[i] + last[i] for i in dims))
    inside = [slice(max(0, last[i] - part.padding[i]), None) for i in dims]
    room = padded[(slice(None), slice(None), *inside)]
    # Positions that see padding alone have no part in it.
    first = [max(0, part.padding[i] - last[i]) for i in dims]
    taken = [slice(f, f + n) for f, n in zip(first, room.shape[2:], strict=True)]
    given = grid[(slice(None), slice(None), *taken)]
    room[(slice(None), slice(None), *(slice(0, s) for s in given.shape[2:]))] = given
    offsets = list(itertools.product(*(range(k) for k in part.kernel)))
    shifted = grid.new_empty(n, groups, len(offsets), *extent)
    for number, offset in enumerate(offsets):
        starts = [k * d for k, d in zip(offset, part.dilation, strict=True)]
        where = [slice(start, start + e) for start, e in zip(starts, extent, strict=True)]
        shifted[:, :, number] = padded[(slice(None), slice(None), *where)]
    left = shifted.view(n * groups, len(offsets), -1)
    right = part.signal.reshape(n * groups, part.signal.shape[1] // groups, -1)
    return Outer(left.mT, right.mT, groups)
