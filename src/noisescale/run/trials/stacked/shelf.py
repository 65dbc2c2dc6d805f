"""Tensors of many trials in one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Shelf:
    """One tensor per parameter, shape (trials, ...), all of them views of one flat tensor.

    What treats every trial alike takes one pass over ``flat``; the rest goes by ``parts``.

    Attributes:
        flat: shape (all numbers,).
        parts: per parameter, contiguous, shape (trials, *parameter shape).

    Args:
        parts: copied; equal first dimension, dtype and device.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.flat = torch.cat([part.reshape(-1) for part in parts])
        self.parts: list[Tensor] = []
        start = 0
        for part in parts:
            self.parts.append(self.flat[start : start + part.numel()].view(part.shape))
            start += part.numel()

    @property
    def trials(self) -> int:
        """How many trials it holds."""
        return len(self.parts[0])

    def zeros(self) -> Shelf:
        """Return a shelf of the same shapes that holds zeros."""
        return Shelf([torch.zeros_like(part) for part in self.parts])

    def rows(self, rows: Tensor) -> Shelf:
        """Return a shelf of some trials, in that order; ``rows`` has shape (kept,)."""
        return Shelf([part.index_select(0, rows) for part in self.parts])

    def joined(self, other: Shelf) -> Shelf:
        """Return a shelf of both's trials."""
        pairs = zip(self.parts, other.parts, strict=True)
        return Shelf([torch.cat(pair) for pair in pairs])


def columns(values: Tensor, part: Tensor) -> Tensor:
    """Shape one value per trial, shape (trials,), so that it multiplies a part.

    >>> columns(torch.ones(3), torch.ones(3, 2, 4)).shape
    torch.Size([3, 1, 1])
    """
    return values.view(-1, *[1] * (part.dim() - 1))
