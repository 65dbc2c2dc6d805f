"""Batches for many trials at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from noisescale.measure.batches import EpochBatches, move, take
from noisescale.run.trials.stacked.columns import Columns
from noisescale.workload import Workload


class Feed:
    """Makes the batches of several orders of the data together.

    Args:
        workload: its training data is read.
        device: where the tensors are wanted.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self._workload, self._device = workload, device
        self._columns: dict[int, Columns | None] = {}
        data = workload.train
        parts = data if isinstance(data, tuple | list) else (data,)
        self._parts: list[Tensor] | None = None
        if all(isinstance(part, Tensor | np.ndarray) for part in parts):
            # collate is for datasets that are not tensors: take() leaves it aside here as well
            self._parts = [_tensor(part).to(device) for part in parts]

    def columns(self, place: int) -> Columns | None:
        """Return how often the columns of an input are used, if that leaves much out.

        Args:
            place: of the input among a batch's tensors.
        """
        if place not in self._columns:
            inputs = None if self._parts is None else self._parts[place]
            found = None if inputs is None or inputs.dim() < 2 else Columns.of(inputs)
            self._columns[place] = found
        return self._columns[place]

    def leaves(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of a batch of each order, shape (orders, examples, ...).

        Args:
            indices: examples of each order, shape (examples,).
        """
        if self._parts is None:
            batches = [tree_leaves(self.batch(each)) for each in indices]
            return [torch.stack(same) for same in zip(*batches, strict=True)]
        if len(indices) == 1:
            return [part.index_select(0, indices[0]).unsqueeze(0) for part in self._parts]
        every = torch.cat(list(indices))
        shape = (len(indices), len(indices[0]))
        return [part.index_select(0, every).view(*shape, *part.shape[1:]) for part in self._parts]

    def batch(self, indices: Tensor) -> Any:
        """Return one batch as the loss takes it."""
        return move(take(self._workload.train, indices, self._workload.collate), self._device)

    def order(self, batch_size: int, seed: int) -> EpochBatches:
        """Return the endless index batches of a seed."""
        generator = torch.Generator().manual_seed(seed)
        return EpochBatches(self._workload.train_size, batch_size, generator)


def _tensor(part: Tensor | np.ndarray) -> Tensor:
    if isinstance(part, np.ndarray) and min(part.strides, default=0) < 0:
        part = np.ascontiguousarray(part)  # torch knows no steps backwards
    return torch.as_tensor(part)
