"""Which sum of the parts' gradients is the gradient of the batch: found, not assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from noisescale.errors import InvalidInputError
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
"""Shares found from rounded gradients may be negative by so much. (assumed)"""

_KEPT = 8
"""Gradients kept at a time, each as large as the model; others are computed again."""

_PAIRS = 8
"""So many pairs of parts are compared at most. (assumed)"""

_SCALED = 0.05
"""A scale that goes with the number of examples changes more than this between a batch and its
parts. (assumed)"""

_PARALLEL = 1e-6
"""Gradients whose squared sine is below this give no two weights. (assumed)"""


@dataclass(frozen=True)
class Fit:
    """How the parts make up the batch, in one condition.

    Attributes:
        kind: ``mean`` of the examples, ``sum``, ``scaled`` (the mean times a constant),
            ``sum_and_constant`` (a sum and what is the same for every batch), ``weighted`` (a
            mean with other weights than the numbers of examples), ``rescaled`` (that times a
            constant) or ``none``.
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
        if self._adds_something_constant(parts):
            return Fit("sum_and_constant", ones)
        for free in (False, True):
            weights = self._weights(parts, free=free)
            if weights is None or not self._all_count(parts, weights):
                continue
            if self._holds_across(parts, weights, free=free) and (
                not free or self._by_pairs_alike(parts)
            ):
                return Fit("rescaled" if free else "weighted", tuple(weights), self._empty(parts))
        return Fit("none", own)

    def _all_count(self, parts: Sequence[Tensor], weights: Sequence[float]) -> bool:
        """Whether only parts without a gradient weigh nothing; a median picks one of many."""
        least = _SHARE_SLACK * max(weights)
        unused = [part for part, weight in zip(parts, weights, strict=True) if weight <= least]
        found = [self._of([part]) for part in unused]
        return not any(_counts(one) and inner(one.gradient, one.gradient) for one in found)

    def _empty(self, parts: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(i for i, part in enumerate(parts) if not _counts(self._of([part])))

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

    def _adds_something_constant(self, parts: Sequence[Tensor]) -> bool:
        """Whether g_A + g_B - g_AB is the same for two pairs of parts."""
        if len(parts) < 4:
            return False
        pairs = (parts[:2], parts[2:4])
        size, losses, left = 0.0, [], []
        for pair in pairs:
            both, one, other = self._of(pair), self._of(pair[:1]), self._of(pair[1:])
            made = [(1.0, one), (1.0, other), (-1.0, both)]
            left.append(combined((weight, found.gradient) for weight, found in made))
            losses.append(sum(weight * found.loss for weight, found in made))
            size = max(size, *(sizes(f.gradient, self._bench.inventory).total for _, f in made))
        apart = self._bench.gap(*left).total
        most = max(abs(found.loss) for pair in pairs for found in (self._of(pair),))
        return apart <= self._bench.unit * size and self._same_loss(losses[0], losses[1], most)

    def _weights(self, parts: Sequence[Tensor], *, free: bool) -> list[float] | None:
        """Return weights found by halves; they add up to 1 unless ``free``."""
        if len(parts) == 1:
            return [1.0]
        left, right = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        found = self._two(left, right, free=free)
        if found is None:
            return None
        weights: list[float] = []
        for side, weight in ((left, found[0]), (right, found[1])):
            inside = [0.0] * len(side) if weight == 0 else self._weights(side, free=free)
            if inside is None:
                return None
            weights += [weight * value for value in inside]
        return weights

    def _holds_across(
        self, parts: Sequence[Tensor], weights: Sequence[float], *, free: bool
    ) -> bool:
        """Check the weights where no half was fitted: two neighbours on either side of the middle.

        A model of one weight meets any single equation.
        """
        middle = len(parts) // 2
        pair, two = parts[middle - 1 : middle + 1], weights[middle - 1 : middle + 1]
        if free and abs(sum(weights) - 1) < _SCALED:
            return False  # more like a function of the mean, such as its square root
        if len(parts) < 3 or min(two) <= 0:
            return True
        both, one, other = self._of(pair), self._of(pair[:1]), self._of(pair[1:])
        first, second = (weight / sum(two) for weight in two)
        if free:
            mean = combined([(first, one.gradient), (second, other.gradient)])
            factor = inner(mean, both.gradient) / (inner(mean, mean) or math.nan)
            first, second = factor * first, factor * second
        return self._balanced(both, (first, one), (second, other))

    def _by_pairs_alike(self, parts: Sequence[Tensor]) -> bool:
        """Whether two neighbours are rescaled as any others of these sizes are.

        Two free weights meet a root of a mean too, gradient and loss (Euler's theorem: it is
        homogeneous of degree 1 in the parts' losses), but their sum then goes with the losses.
        """
        if len(self._bench.seeds) > 1:
            return True  # the weights are not known well enough
        if len(parts) == 2:
            parts = [half for part in parts for half in part.tensor_split(2) if len(half)]
        pairs = [pair for pair in pairwise(parts) if _lengths(pair) == _lengths(parts[:2])]
        try:
            found = [self._two([one], [other], free=True) for one, other in pairs[:_PAIRS]]
        except InvalidInputError:  # such small parts cannot be run
            return True
        sums = [sum(weights) for weights in found if weights is not None]
        slack = max(_SHARE_SLACK, self._bench.unit)
        return not sums or max(sums) - min(sums) <= slack * max(sums)

    def _two(
        self, left: Sequence[Tensor], right: Sequence[Tensor], *, free: bool
    ) -> tuple[float, float] | None:
        """Return a, b with G = a G_left + b G_right, and the losses alike; None without.

        One number is sought, or two if ``free``; a least-squares fit of the gradients gives them.
        """
        whole, one, other = self._of([*left, *right]), self._of(left), self._of(right)
        for a, b in ((0.0, 1.0), (1.0, 0.0)):
            # A part in which nothing counts is 0 / 0.
            if not _counts(one if b else other):
                return (a, b) if self._balanced(whole, (a, one), (b, other)) else None
        found = (
            _least_squares(whole, one, other)
            if free
            else _least_squares_mean(
                whole, one, other, sum(map(len, left)) / sum(map(len, [*left, *right]))
            )
        )
        # Shares of what counts; by one unknown a mixing loss of one weight could be met too.
        if not all(value >= -_SHARE_SLACK for value in found):
            return None
        return found if self._balanced(whole, (found[0], one), (found[1], other)) else None

    def _balanced(self, whole: Found, *weighted: tuple[float, Found]) -> bool:
        """Whether gradients and losses add up to those of one pass."""
        used = [(weight, found) for weight, found in weighted if weight]
        made = combined((weight, found.gradient) for weight, found in used)
        loss = sum(weight * found.loss for weight, found in used)
        left = self._bench.gap(made, whole.gradient).total
        size = max(
            sizes(found.gradient, self._bench.inventory).total * max(1.0, weight)
            for weight, found in ((1.0, whole), *used)
        )
        allowed = max(self._bench.unit * size, self._bench.tolerance(self._condition).total)
        largest = max(abs(weight * found.loss) for weight, found in used)
        return left <= allowed and self._same_loss(loss, whole.loss, largest)

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
            if len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self._sum([torch.cat(list(parts))], [1.0])
        return self._known[key]


def _lengths(parts: Sequence[Tensor]) -> list[int]:
    return [len(part) for part in parts]


def _counts(found: Found) -> bool:
    """Whether there was anything to average; 0 / 0 otherwise."""
    return math.isfinite(found.loss) and finite(found.gradient)


def _least_squares_mean(
    whole: Found, one: Found, other: Found, share: float
) -> tuple[float, float]:
    """Fit w, 1 - w; the share of the examples where both gradients are the same."""
    apart = combined([(1.0, one.gradient), (-1.0, other.gradient)])
    beyond = combined([(1.0, whole.gradient), (-1.0, other.gradient)])
    square = inner(apart, apart)
    weight = inner(beyond, apart) / square if square else share
    return weight, 1 - weight


def _least_squares(whole: Found, one: Found, other: Found) -> tuple[float, float]:
    """Fit both weights; NaN where the gradients are parallel."""
    aa, bb = inner(one.gradient, one.gradient), inner(other.gradient, other.gradient)
    ab = inner(one.gradient, other.gradient)
    ga, gb = inner(whole.gradient, one.gradient), inner(whole.gradient, other.gradient)
    determinant = aa * bb - ab**2
    if determinant <= _PARALLEL * aa * bb:
        return math.nan, math.nan
    return (ga * bb - gb * ab) / determinant, (gb * aa - ga * ab) / determinant
