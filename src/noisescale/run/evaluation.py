"""The value of a target's quantity, on validation data or a fixed part of the training data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from noisescale.measure.batches import move, take
from noisescale.workload import Workload, data_size

TRAIN_SUBSET = 1000
"""Training quantities are evaluated on so many training examples, the same ones always."""

LARGEST_BATCH = 1024
"""Examples per evaluation pass."""

_INITIAL = 256
"""Examples behind the initial loss: it only serves to notice divergence."""


class Evaluator:
    """Evaluates one workload again and again; batches of tensors are made once.

    Args:
        workload: its loss, metrics and data are used.
        device: where the model lies.
    """

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self._workload = workload
        self._device = device
        self._batches: dict[str, list[tuple[int, Any]]] = {}

    def value(self, model: nn.Module, split: str, metric: str) -> float:
        """Return the mean of a quantity; NaN when it is not finite anywhere.

        Args:
            model: evaluated in ``eval()`` mode without gradients; its mode is restored.
            split: ``train`` or ``validation``.
            metric: ``loss`` or a name of the workload's metrics.
        """
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        with evaluating(model):
            for size, batch in self.batches(split):
                total += size * self.mean(model, batch, metric).double().cpu()
                count += size
        return float(total / count)

    def batches(self, split: str) -> Iterable[tuple[int, Any]]:
        """Return the split's batches on the device, each with its number of examples."""
        batches = self._batches.get(split) or self._cut(split)
        if split not in self._batches and self._may_keep(split):
            batches = self._batches[split] = list(batches)
        return batches

    def initial_loss(self, model: nn.Module) -> float:
        """Return the loss on a few fixed training examples; infinite when not finite."""
        indices = self._subset()[:_INITIAL]
        batch = move(take(self._workload.train, indices, self._workload.collate), self._device)
        with evaluating(model):
            loss = float(self._workload.loss(model, batch))
        return loss if math.isfinite(loss) else math.inf

    def _may_keep(self, split: str) -> bool:
        """A dataset that is read example by example may be larger than memory."""
        parts = self._workload.evaluate
        parts = parts if isinstance(parts, tuple | list) else (parts,)
        return split == "train" or all(isinstance(part, torch.Tensor) for part in parts)

    def mean(self, model: Any, batch: Any, metric: str) -> torch.Tensor:
        """Return the mean of a quantity over one batch, a scalar."""
        if metric == "loss":
            loss: torch.Tensor = self._workload.loss(model, batch)
            return loss.reshape(())
        assert self._workload.metrics is not None
        values: torch.Tensor = self._workload.metrics(model, batch)[metric]
        return values.double().mean()

    def _cut(self, split: str) -> Iterator[tuple[int, Any]]:
        data = self._workload.train if split == "train" else self._workload.evaluate
        everything = self._subset() if split == "train" else torch.arange(data_size(data))
        for start in range(0, len(everything), LARGEST_BATCH):
            indices = everything[start : start + LARGEST_BATCH]
            batch = take(data, indices, self._workload.collate)
            yield len(indices), move(batch, self._device)

    def _subset(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(self._workload.train_size, generator=generator)[:TRAIN_SUBSET]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation without gradients, and each back to its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
