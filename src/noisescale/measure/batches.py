"""Batches out of datasets, tensors and nested containers of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import default_collate

from noisescale.errors import InvalidInputError

Collate = Callable[[list[Any]], Any] | None


def take(data: Any, indices: Tensor, collate: Collate = None) -> Any:
    """Make one batch of the examples at ``indices``.

    Args:
        data: a tensor, a tuple or list of tensors with equal first dimension, or a map-style
            dataset. NumPy arrays may stand for tensors; their rows become tensors.
        indices: shape (batch,), int64.
        collate: makes a batch of a list of examples of a dataset; default: torch's.

    Returns:
        Rows of the tensor, a tuple of rows, or what ``collate`` returns.

    Raises:
        InvalidInputError: an array's type is none of torch's.

    >>> take(torch.tensor([10, 20, 30]), torch.tensor([2, 0])).tolist()
    [30, 10]
    """
    kinds = Tensor | np.ndarray
    if isinstance(data, kinds):
        return _picked(data, indices)
    if isinstance(data, tuple | list) and data and all(isinstance(part, kinds) for part in data):
        return tuple(_picked(part, indices) for part in data)
    if isinstance(data, torch.utils.data.TensorDataset) and collate is None:
        return tuple(part[indices.to(part.device)] for part in data.tensors)
    return (collate or default_collate)([data[i] for i in indices.tolist()])


def _picked(part: Tensor | npt.NDArray[Any], indices: Tensor) -> Tensor:
    if isinstance(part, Tensor):
        return part[indices.to(part.device)]
    try:
        return torch.from_numpy(part[indices.cpu().numpy()])
    except TypeError:
        raise InvalidInputError(
            f"data of NumPy type {part.dtype}",
            "numbers that torch knows are required",
            "convert it, for example with torch.from_numpy(data.astype('float32'))",
        ) from None


def batch_size_of(batch: Any) -> int:
    """Return the number of examples of a batch: its first tensor's first dimension.

    Raises:
        InvalidInputError: the batch holds no tensor with a dimension.

    >>> batch_size_of({"x": torch.zeros(4, 2), "y": torch.zeros(4)})
    4
    """
    size = _first_size(batch)
    if size is None:
        raise InvalidInputError(
            f"batch of type {type(batch).__name__}",
            "a tensor, or nested tuples and mappings of tensors, batch first, is required",
            "collate the examples into tensors",
        )
    return size


def _first_size(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, tuple | list):
        return next((s for s in map(_first_size, batch) if s is not None), None)
    return None


def move(batch: Any, device: torch.device | str) -> Any:
    """Move every tensor of a batch to a device; the containers keep their types."""
    return _map(batch, lambda tensor: tensor.to(device))


def slices(batch: Any, size: int) -> Iterator[Any]:
    """Cut a batch into consecutive micro-batches of ``size`` examples, the last maybe smaller.

    Tensors whose first dimension is the batch's are cut; anything else goes whole into every
    slice.

    >>> [part.tolist() for part in slices(torch.arange(5), 2)]
    [[0, 1], [2, 3], [4]]
    """
    count = batch_size_of(batch)
    for start in range(0, count, size):
        yield _rows(batch, start, start + size, count)


def _rows(batch: Any, start: int, stop: int, count: int) -> Any:
    def cut(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if tensor.dim() and len(tensor) == count else tensor

    return _map(batch, cut)


def _map(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _map(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(value, function) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_map(value, function) for value in batch)
    return batch


class EpochBatches:
    """Endless index batches: every epoch a fresh shuffle, without replacement inside it.

    The partial batch at an epoch's end is dropped.

    Args:
        size: number of examples.
        batch_size: examples per batch, at most ``size``.
        generator: the shuffles' own random state.

    Raises:
        InvalidInputError: the batch is empty or larger than the data.

    >>> batches = EpochBatches(5, 2, torch.Generator().manual_seed(0))
    >>> [len(next(batches)) for _ in range(3)], batches.per_epoch
    ([2, 2, 2], 2)
    """

    def __init__(self, size: int, batch_size: int, generator: torch.Generator) -> None:
        check_batch_size(batch_size, size)
        self.per_epoch = size // batch_size
        self._size, self._batch_size, self._generator = size, batch_size, generator
        self._order = torch.empty(0, dtype=torch.int64)
        self._next = self.per_epoch

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self._next >= self.per_epoch:
            self._order = torch.randperm(self._size, generator=self._generator)
            self._next = 0
        start = self._next * self._batch_size
        self._next += 1
        return self._order[start : start + self._batch_size]


def check_batch_size(batch_size: int, size: int) -> None:
    """Refuse a batch that is empty or larger than the data."""
    if not 1 <= batch_size <= size:
        raise InvalidInputError(
            f"batch size {batch_size}",
            f"between 1 and the {size} training examples is required",
            f"give at most {size}",
        )
