"""The box that is searched, in per-example coordinates so that one serves all batch sizes.

The rate's coordinate is the temperature (Adam: the rate per example's standard deviation), those
of momentum and of Adam's betas are half-lives in examples, that of weight decay is the share it
takes per example, that of a schedule is its length in examples. All are searched on a log scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from noisescale.errors import InvalidInputError, nearest
from noisescale.records import Recipe
from noisescale.theory import temperature as per
from noisescale.theory.per_example import PerExample, rate_coordinate, rate_of, shrinkage_unit

Point = Mapping[str, float]
"""Coordinates by the name of their dimension."""

WIDTHS = {
    "lr": 64.0,
    "momentum": 64.0,
    "beta1": 64.0,
    "beta2": 64.0,
    "weight_decay": 1000.0,
    "total_examples": 16.0,
}
"""High over low of a dimension that names no bounds, about the recipe's value. (assumed)"""

DIGITS = 6
"""Significant digits of searched values: they are part of a trial's name."""

NOTHING = 1e-4
"""A momentum or beta below this is written as 0. (assumed: it changes no step noticeably)"""


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One searched quantity.

    Attributes:
        name: a key of :data:`WIDTHS`.
        low: lower end of the box in per-example coordinates.
        high: upper end.
    """

    name: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str, recipe: Recipe) -> Self:
        """Read ``NAME`` or ``NAME=LOW:HIGH``, values as the recipe would have them.

        Args:
            text: the bounds are values at the recipe's own batch size.
            recipe: gives the batch size, and the middle where no bounds are named.

        Raises:
            InvalidInputError: the name is unknown, the bounds are no two positive numbers in
                ascending order, or the recipe has no value to centre on.
        """
        name, equals, bounds = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in WIDTHS:
            raise InvalidInputError(
                f"--over {text}", f"{name!r} is not a dimension", nearest(name, WIDTHS)
            )
        if not equals:
            middle, half = coordinate(name, _value(name, recipe), recipe), WIDTHS[name] ** 0.5
            return cls(name=name, low=middle / half, high=middle * half)
        ends = sorted(coordinate(name, value, recipe) for value in _bounds(text, bounds))
        return cls(name=name, low=ends[0], high=ends[1])

    def at(self, share: float) -> float:
        """Return the coordinate a share of the way from low to high on the log scale."""
        return float(self.low * (self.high / self.low) ** share)

    def share(self, value: float) -> float:
        """Return how far a coordinate lies from low to high, the inverse of :meth:`at`."""
        return math.log(value / self.low) / math.log(self.high / self.low)


def coordinate(name: str, value: float, recipe: Recipe) -> float:
    """Return the per-example coordinate of a value in a recipe.

    Args:
        name: the dimension.
        value: as the recipe would have it.
        recipe: its batch size, optimizer, rate and momentum are used.

    Raises:
        InvalidInputError: the value is out of its range.
    """
    if name == "lr":
        return rate_coordinate(recipe.with_changes(lr=value))
    if name in ("momentum", "beta1", "beta2"):
        return per.half_life(decay=value, batch_size=recipe.batch_size)
    if name == "weight_decay":
        return value * shrinkage_unit(recipe)
    return value


def recipe_at(recipe: Recipe, point: Point, batch_size: int) -> Recipe:
    """Return the recipe of a point at a batch size.

    What is not searched stays as the recipe has it per step (momentum, betas, weight decay:
    going up in batch size their exact restatement leaves stability); warm-up, length and
    milestones stay as they are in examples.

    Args:
        recipe: what the point changes.
        point: coordinates; ``lr`` is required.
        batch_size: examples per step.
    """
    lengths = PerExample.of(recipe).at(batch_size)
    base = recipe.with_changes(
        batch_size=batch_size,
        warmup_steps=None,
        warmup_examples=lengths.warmup_examples,
        total_steps=None,
        total_examples=lengths.total_examples,
        schedule=lengths.schedule,
    )
    changes: dict[str, Any] = {}
    if "momentum" in point:
        changes["momentum"] = _decay(point["momentum"], batch_size)
    if "beta1" in point or "beta2" in point:
        changes["betas"] = _betas(recipe, point, batch_size)
    if "total_examples" in point:
        changes["total_examples"] = max(1, round(point["total_examples"]))
        changes["schedule"] = recipe.schedule or {"kind": "cosine"}
    base = base.with_changes(**changes)
    base = base.with_changes(lr=_rounded(rate_of(base, point["lr"])))
    if "weight_decay" in point:
        wd = point["weight_decay"] / shrinkage_unit(base)
        base = base.with_changes(weight_decay=_rounded(wd))
    return base


def point_of(recipe: Recipe, names: Sequence[str]) -> dict[str, float]:
    """Return the coordinates of a recipe: the inverse of :func:`recipe_at`.

    Args:
        recipe: as :func:`recipe_at` returned it.
        names: the dimensions.
    """
    return {name: coordinate(name, _value(name, recipe), recipe) for name in names}


def extrapolated(tuned: Mapping[int, float], batch_size: int, *, square_root: bool) -> float:
    """Return the rate's best coordinate expected at a batch size not tuned yet.

    A power law through the two nearest tuned sizes, held within what trainings show: SGD's best
    rate grows at most linearly and does not fall, Adam's likewise.

    Args:
        tuned: best coordinate by batch size, at least one.
        batch_size: where to.
        square_root: whether the optimizer's rate goes with the square root of the batch size.
    """
    near = sorted(tuned, key=lambda size: abs(math.log(size / batch_size)))
    slope = FIRST_SLOPE[square_root]
    if len(near) > 1:
        a, b = near[:2]
        slope = math.log(tuned[a] / tuned[b]) / math.log(a / b)
    low, high = SLOPES[square_root]
    return float(tuned[near[0]] * (batch_size / near[0]) ** min(max(slope, low), high))


SLOPES = {False: (-1.0, 0.0), True: (-0.5, 0.5)}
"""Bounds of the exponent of the best coordinate, by whether the optimizer's rate goes with
the square root: the rate itself then
grows like a power of B between 0 and 1. (measured: linear at small B, then saturated)"""

FIRST_SLOPE = {False: -0.25, True: 0.0}
"""The exponent while only one size is tuned. (measured: the best rate of SGD grows like B^0.75
on the way to saturation, that of Adam like its square root)"""


def _bounds(text: str, bounds: str) -> list[float]:
    try:
        low, high = (float(part) for part in bounds.split(":"))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 < low < high < math.inf:
        raise InvalidInputError(
            f"--over {text}",
            "two positive numbers in ascending order are required",
            "write for example --over lr=0.01:1",
        )
    return [low, high]


def _value(name: str, recipe: Recipe) -> float:
    """Return a dimension's value in a recipe."""
    value: float | None
    if name in ("beta1", "beta2"):
        value = None if recipe.betas is None else recipe.betas[name == "beta2"]
    elif name == "total_examples" and recipe.total_steps is not None:
        value = recipe.total_steps * recipe.batch_size
    else:
        value = getattr(recipe, name)
    if not value:
        # a momentum rounded to 0 lies below every half-life
        if name in ("momentum", "beta1", "beta2") and value == 0:
            return NOTHING
        raise InvalidInputError(
            f"--over {name}",
            f"the recipe has no {name} to search about",
            f"give bounds, for example --over {name}=LOW:HIGH",
        )
    return value


def _betas(recipe: Recipe, point: Point, batch_size: int) -> tuple[float, float]:
    one, two = recipe.betas or (0.9, 0.999)
    return (
        _decay(point["beta1"], batch_size) if "beta1" in point else one,
        _decay(point["beta2"], batch_size) if "beta2" in point else two,
    )


def _decay(examples: float, batch_size: int) -> float:
    decay = per.decay_of_half_life(examples=examples, batch_size=batch_size)
    # The complement is rounded: 0.9999995 must not become 1.
    return 0.0 if decay < NOTHING else 1 - _rounded(1 - decay)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
