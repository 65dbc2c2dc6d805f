"""What a loss averages over, read off the batch: which counts go as the weights of its parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = (-100, -1, 0)
"""Values that commonly mark what does not count: torch's ignore_index, and two of padding."""

_ALIKE = 1e-3
"""Shares this near each other are equal. (assumed: they come from float32 gradients)"""


def explain_weights(parts: Sequence[Any], weights: Sequence[float]) -> str | None:
    """Name the entries of the batch whose numbers per part go as the weights; None if none do.

    Args:
        parts: the batches.
        weights: adding up to 1.

    >>> labels = torch.tensor([[1, -100], [1, 1]])
    >>> explain_weights([(labels[:1],), (labels[1:],)], [1 / 3, 2 / 3])
    'the entries of batch[0] that are not -100'
    """
    counted = [dict(_counts(part)) for part in parts]
    for name in counted[0]:
        values = [counts.get(name, math.nan) for counts in counted]
        total = sum(values)
        if total and all(
            abs(value / total - weight) <= _ALIKE * max(weights)
            for value, weight in zip(values, weights, strict=True)
        ):
            return name
    return None


def _counts(batch: Any) -> Iterator[tuple[str, float]]:
    for path, tensor in _leaves(batch, "batch"):
        if tensor.dtype == torch.bool:
            yield f"the true entries of {path}", float(tensor.sum())
            continue
        if not tensor.is_floating_point() and not tensor.is_complex():
            for value in IGNORED:
                yield f"the entries of {path} that are not {value}", float((tensor != value).sum())
            yield from _shifted(path, tensor)
        yield f"the sum of {path}", float(tensor.double().sum().real)
        yield f"the entries of {path}", float(tensor.numel())


def _shifted(path: str, tensor: Tensor) -> Iterator[tuple[str, float]]:
    """Count what language models predict: the tokens but the first of each sequence."""
    if tensor.dim() == 2:
        for value in IGNORED:
            count = float((tensor[:, 1:] != value).sum())
            yield f"the entries of {path}[:, 1:] that are not {value}", count


def _leaves(thing: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(thing, Tensor):
        yield path, thing.detach()
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield from _leaves(value, f"{path}[{key!r}]")
    elif isinstance(thing, tuple | list):
        for index, value in enumerate(thing):
            yield from _leaves(value, f"{path}[{index}]")
