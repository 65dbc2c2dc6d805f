"""The examples of one batch, read once, and batches made of some of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from noisescale.errors import InvalidInputError
from noisescale.measure.batches import _map, batch_size_of, take
from noisescale.workload import Workload


class Examples:
    """Some examples of a workload's training data, held still.

    A dataset may augment at random: it is read once, and what was read is collated anew for every
    batch asked for, as a loader would do, padding included.

    Args:
        workload: whose training data.
        indices: which examples, int64.
    """

    def __init__(self, workload: Workload, indices: Tensor) -> None:
        data, self._collate = workload.train, workload.collate
        self._rows = _in_rows(data) or (
            isinstance(data, TensorDataset) and workload.collate is None
        )
        self.collated = not self._rows
        """Whether a batch is made by a function, which may pad it by what is in it."""
        self._held = (
            take(data, indices, self._collate)
            if self._rows
            else [data[index] for index in indices.tolist()]
        )
        self.count = len(indices)

    def batch(self, positions: Tensor) -> Any:
        """Return the batch of the examples at these positions, in this order."""
        if self._rows:
            return take(self._held, positions)
        return (self._collate or default_collate)([self._held[i] for i in positions.tolist()])

    def rows(self, positions: Tensor) -> Any:
        """Return the same examples as rows of the batch of all of them.

        Raises:
            InvalidInputError: that batch does not have one row per example.
        """
        whole = self.batch(torch.arange(self.count))
        if batch_size_of(whole) != self.count:
            raise InvalidInputError(
                "a batch", "one row per example is required to cut it", "collate it otherwise"
            )

        def picked(tensor: Tensor) -> Tensor:
            return tensor[positions] if tensor.dim() and len(tensor) == self.count else tensor

        return _map(whole, picked)


def _in_rows(data: Any) -> bool:
    kinds = Tensor | np.ndarray
    if isinstance(data, tuple | list):
        return bool(data) and all(isinstance(part, kinds) for part in data)
    return isinstance(data, kinds)


def in_parts(count: int, size: int) -> list[Tensor]:
    """Return the positions of consecutive parts, the last maybe smaller.

    >>> [part.tolist() for part in in_parts(5, 2)]
    [[0, 1], [2, 3], [4]]
    """
    return [torch.arange(s, min(s + size, count)) for s in range(0, count, size)]
