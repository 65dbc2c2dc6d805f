"""Sweeps beside each other: fewest steps, fewest examples and critical batch of optimizers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from noisescale.errors import InvalidInputError
from noisescale.records import Compared, Interval, Tradeoff

NOTHING = Interval(point=None, low=None, high=None)


def compare(fits: Mapping[str, Tradeoff], *, against: str | None = None) -> list[Compared]:
    """Return ratios of Smin, Emin and Bcrit to those of one of the sweeps.

    Errors of different sweeps are taken as independent: half-widths of logarithms add in
    quadrature, each side for itself.

    Args:
        fits: steps laws by name of the optimizer, or of whatever was varied; same target.
        against: the name to compare with; default: the first.

    Returns:
        One entry for each other name. A ratio without a point on both sides is nothing.

    Raises:
        InvalidInputError: fewer than two fits, an unknown name, or different targets.
    """
    names = list(fits)
    base = against if against is not None else names[0] if names else ""
    if len(names) < 2 or base not in fits:
        raise InvalidInputError(
            f"{base!r} of {', '.join(names) or 'nothing'}",
            "two sweeps, one of them to compare with, are required",
            "name one of them",
        )
    targets = {fit.target for fit in fits.values()}
    if len(targets) > 1:
        raise InvalidInputError(
            f"targets {', '.join(map(str, targets))}", "one target is required", "choose one"
        )
    other = fits[base]
    return [
        Compared(
            name=name,
            against=base,
            steps_min=ratio(fit.steps_min, other.steps_min),
            examples_min=ratio(fit.examples_min, other.examples_min),
            critical_batch=ratio(fit.critical_batch, other.critical_batch),
        )
        for name, fit in fits.items()
        if name != base
    ]


def ratio(upper: Interval, lower: Interval) -> Interval:
    """Divide one interval by another, errors independent on the log scale.

    >>> wide = Interval(point=2.0, low=1.0, high=4.0)
    >>> ratio(wide, Interval(point=1.0, low=1.0, high=1.0))
    Interval(point=2.0, low=1.0, high=4.0)
    """
    if not upper.point or not lower.point:
        return NOTHING
    down = _distances(upper.point, upper.low, lower.point, lower.high)
    up = _distances(upper.point, upper.high, lower.point, lower.low)
    point = upper.point / lower.point
    return Interval(
        point=point,
        low=0.0 if down is None else point * math.exp(-down),
        high=None if up is None else point * math.exp(up),
    )


def _distances(
    one: float, one_end: float | None, two: float, two_end: float | None
) -> float | None:
    """Return the joint half-width in logarithms; None where an end is open."""
    if not one_end or not two_end:
        return None
    return math.hypot(math.log(one_end / one), math.log(two_end / two))
