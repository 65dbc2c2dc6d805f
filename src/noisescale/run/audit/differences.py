"""Sizes of gradients and of their differences, per parameter group and in all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from noisescale.measure.inventory import Inventory

Gradient = Mapping[int, Tensor]
"""By index of the inventory's slots; a parameter without a gradient is absent."""


@dataclass(frozen=True)
class Sizes:
    """A norm per parameter group.

    Attributes:
        groups: norms by group.
    """

    groups: dict[str, float]

    @property
    def total(self) -> float:
        """Norm over all groups."""
        return math.sqrt(sum(value**2 for value in self.groups.values()))

    def over(self, base: Sizes) -> tuple[float | None, dict[str, float | None]]:
        """Return total and groups relative to others'; None where that says nothing."""
        groups = {name: ratio(value, base.groups[name]) for name, value in self.groups.items()}
        return ratio(self.total, base.total), groups


def ratio(value: float, base: float) -> float | None:
    """Divide; 0 / 0 is 0, and what is not finite is None.

    >>> ratio(1.0, 4.0), ratio(0.0, 0.0), ratio(1.0, 0.0)
    (0.25, 0.0, None)
    """
    if value == 0:
        return 0.0
    found = value / base if base else math.inf
    return found if math.isfinite(found) else None


def sizes(gradient: Gradient, inventory: Inventory) -> Sizes:
    """Return the norms of a gradient."""
    return _collected(inventory, ((i, _square(g)) for i, g in gradient.items()))


def gap(one: Gradient, other: Gradient, inventory: Inventory) -> Sizes:
    """Return the norms of a difference; a missing gradient counts as zero."""
    return _collected(
        inventory,
        (
            (i, _square(_difference(one.get(i), other.get(i))))
            for i in sorted(one.keys() | other.keys())
        ),
    )


def inner(one: Gradient, other: Gradient) -> float:
    """Return the inner product of two gradients."""
    shared = one.keys() & other.keys()
    return sum(float((_wide(one[i]).conj() * _wide(other[i])).sum().real) for i in shared)


def combined(parts: Iterable[tuple[float, Gradient]]) -> dict[int, Tensor]:
    """Return a sum of gradients with weights; those of weight 0 are left out, if not finite too.

    >>> combined([(0.5, {0: torch.ones(1)}), (0.0, {0: torch.full((1,), torch.nan)})])
    {0: tensor([0.5000])}
    """
    total: dict[int, Tensor] = {}
    for weight, gradient in parts:
        if weight == 0:
            continue
        for index, value in gradient.items():
            share = value * weight
            total[index] = total[index] + share if index in total else share
    return total


def finite(gradient: Gradient) -> bool:
    """Whether every number is finite."""
    return all(bool(torch.isfinite(value).all()) for value in gradient.values())


def _collected(inventory: Inventory, squares: Iterable[tuple[int, float]]) -> Sizes:
    sums = {slot.group: 0.0 for slot in inventory.slots}
    for index, square in squares:
        sums[inventory.slots[index].group] += square
    return Sizes({group: math.sqrt(value) for group, value in sums.items()})


def _difference(one: Tensor | None, other: Tensor | None) -> Tensor:
    if one is None or other is None:
        present = one if one is not None else other
        assert present is not None
        return present
    return _wide(one) - _wide(other).to(one.device)


def _square(value: Tensor) -> float:
    return float(_wide(value).abs().square().sum())


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)
