"""Which sum of the parts' gradients is the gradient of the batch: found, not assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noisescale.run.audit.bench import Bench, Found, shares
from noisescale.run.audit.conditions import Condition
from noisescale.run.audit.differences import (
    combined,
    finite,
    inner,
    sizes,
)

LOSS_UNITS = 2.0
"""Losses are equal within so many times what spacing explains in gradients. (assumed)"""

_SHARE_SLACK = 1e-3
"""Shares found from rounded gradients may leave [0, 1] by so much. (assumed)"""


@dataclass(frozen=True)
class Fit:
    """How the parts make up the batch, in one condition.

    Attributes:
        kind: ``mean`` of the examples, ``sum``, ``scaled`` (the mean times a constant),
            ``weighted`` (a mean with other weights than the numbers of examples) or ``none``.
        weights: of the parts; their shares of the examples for ``none``.
        empty: parts whose loss or gradient is not finite and that count for nothing.
    """

    kind: str
    weights: tuple[float, ...]
    empty: tuple[int, ...] = ()


class Fitter:
    """Looks for weights of the parts under which accumulation gives the batch's gradient.

    Args:
        bench: the batch.
        condition: everything else that could differ is switched off in it.
    """

    def __init__(self, bench: Bench, condition: Condition) -> None:
        self._bench, self._condition = bench, condition
        self._known: dict[tuple[int, int], Found] = {}

    def fit(self, parts: Sequence[Tensor]) -> Fit:
        """Try the simplest explanation first.

        Weights are found by halves, so that every number found answers to a whole gradient and
        to the loss.
        """
        own = tuple(shares(parts))
        if self._explains(parts, own):
            return Fit("mean", own)
        ones = (1.0,) * len(parts)
        if self._explains(parts, ones):
            return Fit("sum", ones)
        factor = self._factor(parts, own)
        if factor is not None:
            return Fit("scaled", tuple(factor * share for share in own))
        weights = self._weights(parts)
        if weights is None or not self._holds_across(parts, weights):
            return Fit("none", own)
        empty = tuple(i for i, part in enumerate(parts) if not _counts(self._of([part])))
        return Fit("weighted", tuple(weights), empty)

    def _explains(self, parts: Sequence[Tensor], weights: Sequence[float]) -> bool:
        found = self._sum(parts, weights)
        return self._bench.same(found.gradient, self._of(parts).gradient, self._condition)

    def _factor(self, parts: Sequence[Tensor], own: Sequence[float]) -> float | None:
        mean, whole = self._sum(parts, own), self._of(parts)
        square = inner(mean.gradient, mean.gradient)
        if not square or not mean.loss:
            return None
        factor = inner(mean.gradient, whole.gradient) / square
        if not self._same_loss(factor * mean.loss, whole.loss, mean.loss):
            return None
        scaled = combined([(factor, mean.gradient)])
        if not self._bench.same(scaled, whole.gradient, self._condition):
            return None
        return factor if self._by_size_alone(parts) else None

    def _by_size_alone(self, parts: Sequence[Tensor]) -> bool:
        """Whether other examples in as many parts have the same factor."""
        sides = [parts[: len(parts) // 2], parts[len(parts) // 2 :]]
        if len({tuple(map(len, side)) for side in sides}) > 1 or len(sides[0]) < 2:
            return True  # there is nothing alike to compare
        factors = []
        for side in sides:
            mean = self._sum(side, shares(side)).gradient
            square = inner(mean, mean)
            factors.append(inner(mean, self._of(side).gradient) / square if square else math.nan)
        return abs(factors[0] - factors[1]) <= _SHARE_SLACK * abs(factors[0])

    def _weights(self, parts: Sequence[Tensor]) -> list[float] | None:
        if len(parts) == 1:
            return [1.0]
        left, right = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        weight = self._weight(left, right)
        if weight is None:
            return None
        sides: list[float] = []
        for side, share in ((left, weight), (right, 1 - weight)):
            within = [0.0] * len(side) if share == 0 else self._weights(side)
            if within is None:
                return None
            sides += [share * value for value in within]
        return sides

    def _holds_across(self, parts: Sequence[Tensor], weights: Sequence[float]) -> bool:
        """Check the weights where no half was fitted: two neighbours on either side of the middle.

        A model of one weight meets any single equation.
        """
        middle = len(parts) // 2
        pair, two = parts[middle - 1 : middle + 1], weights[middle - 1 : middle + 1]
        if len(parts) < 3 or min(two) <= 0:
            return True
        one, other = (self._of([part]) for part in pair)
        return self._balanced(self._of(pair), one, other, two[0] / sum(two))

    def _weight(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> float | None:
        """Return w with G = w G_left + (1 - w) G_right, and the losses alike; None without."""
        whole, one, other = self._of([*left, *right]), self._of(left), self._of(right)
        for weight, kept in ((0.0, other), (1.0, one)):
            # A part in which nothing counts is 0 / 0.
            if not _counts(other if weight else one):
                return weight if self._balanced(whole, kept, kept, weight) else None
        apart = combined([(1.0, one.gradient), (-1.0, other.gradient)])
        square = inner(apart, apart)
        if not square:
            count, all_ = sum(map(len, left)), sum(map(len, left)) + sum(map(len, right))
            weight = count / all_
        else:
            beyond = combined([(1.0, whole.gradient), (-1.0, other.gradient)])
            weight = inner(beyond, apart) / square
        # Shares of what counts; by one unknown a mixing loss of one weight could be met too.
        if not -_SHARE_SLACK <= weight <= 1 + _SHARE_SLACK:
            return None
        return weight if self._balanced(whole, one, other, weight) else None

    def _balanced(self, whole: Found, one: Found, other: Found, weight: float) -> bool:
        made = combined([(weight, one.gradient), (1 - weight, other.gradient)])
        loss = (weight * one.loss if weight else 0.0) + ((1 - weight) * other.loss)
        left = self._bench.gap(made, whole.gradient)
        each = [sizes(found.gradient, self._bench.inventory) for found in (whole, one, other)]
        spacing = self._bench.unit * max(size.total for size in each)
        allowed = max(spacing, self._bench.tolerance(self._condition).total)
        largest = max(abs(one.loss), abs(other.loss))
        return left.total <= allowed and self._same_loss(loss, whole.loss, largest)

    def _same_loss(self, one: float, other: float, size: float) -> bool:
        if len(self._bench.seeds) > 1:
            return True  # the gradients alone are known well enough
        allowed = LOSS_UNITS * self._bench.unit
        return abs(one - other) <= allowed * max(abs(size), abs(other))

    def _sum(self, parts: Sequence[Tensor], weights: Sequence[float]) -> Found:
        return self._bench.split(parts, weights, self._condition)

    def _of(self, parts: Sequence[Tensor]) -> Found:
        """Return the gradient of neighbouring parts in one pass."""
        key = (int(parts[0][0]), int(parts[-1][-1]))
        if key not in self._known:
            self._known[key] = self._sum([torch.cat(list(parts))], [1.0])
        return self._known[key]


def _counts(found: Found) -> bool:
    """Whether there was anything to average; 0 / 0 otherwise."""
    return math.isfinite(found.loss) and finite(found.gradient)
