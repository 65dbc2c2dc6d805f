"""What the classification built-ins share: cross-entropy and the error of each example."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
"""Inputs (examples, ...) and class numbers (examples,)."""


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy over the batch, in nats; a scalar."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def error(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """``error``: 1 where the most likely class is wrong, else 0; shape (examples,)."""
    inputs, labels = batch
    wrong = model(inputs).argmax(dim=1) != labels
    return {"error": wrong.to(torch.float32)}


def small_cnn(*, channels: tuple[int, int, int], features: int, classes: int = 10) -> nn.Module:
    """Two 3x3 convolutions with ReLU, one max-pool by 2, one linear layer.

    Args:
        channels: of the image and after each convolution.
        features: inputs of the linear layer, channels x height/2 x width/2.
        classes: its outputs.
    """
    image, first, second = channels
    return nn.Sequential(
        nn.Conv2d(image, first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(features, classes),
    )
