"""The best learning rate against the batch size: a power law that saturates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError
from noisescale.records import Interval, RateLaw
from noisescale.theory.runs_checked import checked_runs

Array = npt.NDArray[np.float64]

MIN_SIZES = 4
"""Batch sizes with a best rate inside what was tried: three parameters and one to check."""
BEYOND = 5.0
"""The saturation is looked for this far beyond the tested sizes, in logarithms: there the law
is a plain power, or constant. (assumed)"""
POWERS = (-0.5, 2.5)
"""Exponents tried; 1 is linear scaling, 0.5 square root. (assumed)"""
GRID, ZOOMS = 121, 4
"""Places tried of either parameter, and grids, each finer than the one before. (assumed)"""
NOTHING = Interval(point=None, low=None, high=None)


def best_rate(
    *, batch_size: npt.ArrayLike, rate_max: float, saturation: float, exponent: float
) -> Array:
    """Best rate: lr = lr_max / (1 + Bn/B)^p.

    Args:
        batch_size: B, any shape; positive.
        rate_max: lr_max, the best rate at very large batch.
        saturation: Bn, in the unit of the batch size.
        exponent: p; 1 for SGD, about 0.5 for Adam.

    Returns:
        The rate, shape of ``batch_size``.

    Source: McCandlish et al. 2018, eq. 2.6 (p = 1) and section 3 (p between 0.5 and 1 for Adam).

    >>> float(best_rate(batch_size=30, rate_max=1.0, saturation=30, exponent=1.0))
    0.5
    """
    sizes = np.asarray(batch_size, dtype=np.float64)
    rate: Array = rate_max / (1 + saturation / sizes) ** exponent
    return rate


def fit_rate_law(
    *,
    batch_size: npt.ArrayLike,
    rate: npt.ArrayLike,
    on_edge: Sequence[bool] | None = None,
    level: float = 0.95,
) -> RateLaw:
    """Fit the exponent of the best rate at small batch sizes, and where it saturates.

    log lr = log lr_max - p log(1 + Bn/B) + noise. For given p and Bn the level is a mean, so a
    grid over both finds the rest; an interval holds the values for which some fit has a sum of
    squares of at most RSS_min (1 + F/(n - 3)), F the quantile of F(1, n - 3).

    Args:
        batch_size: shape (n,); positive.
        rate: shape (n,), best rates; positive.
        on_edge: shape (n,), True where the best lay on an edge of what was tried: left out.
        level: confidence level, between 0 and 1.

    Returns:
        The law. A saturation that does not show is open (None above, 0 below).

    Raises:
        InvalidInputError: shapes differ, a value is not positive, all sizes are equal, or the
            level is not between 0 and 1.

    Source: the law is McCandlish et al. 2018, eq. 2.6; intervals as in Bates and Watts 1988,
    section 6.1.

    >>> sizes = [1, 4, 16, 64, 256, 1024]
    >>> law = fit_rate_law(batch_size=sizes, rate=[2.0 / (1 + 30 / b) for b in sizes])
    >>> round(law.exponent.point, 2), round(law.saturation.point), round(law.rate_max.point, 1)
    (1.0, 30, 2.0)
    """
    sizes, logs, _ = checked_runs(batch_size, rate, None, level)
    edge = np.zeros(len(sizes), dtype=bool) if on_edge is None else np.asarray(on_edge, dtype=bool)
    if edge.shape != sizes.shape:
        raise InvalidInputError(
            f"on_edge of shape {edge.shape}", "one for each size is required", "check it"
        )
    left_out = tuple(round(float(b)) for b in np.unique(sizes[edge]))
    x, y = np.log(sizes[~edge]), logs[~edge]
    if len(np.unique(x)) < MIN_SIZES:
        return RateLaw(
            exponent=NOTHING,
            saturation=NOTHING,
            rate_max=NOTHING,
            rms_log_error=None,
            sizes=len(np.unique(x)),
            left_out=left_out,
            level=level,
            detail=f"the best rate is known at {len(np.unique(x))} batch sizes; at least "
            f"{MIN_SIZES} are needed: add batch sizes, or rates beyond the edges",
        )
    return _fitted(x, y, left_out, level)


def _fitted(x: Array, y: Array, left_out: tuple[int, ...], level: float) -> RateLaw:
    from scipy.special import fdtri

    n = len(x)
    edges = float(x.min()) - BEYOND, float(x.max()) + BEYOND
    places, powers = np.linspace(*edges, GRID), np.linspace(*POWERS, GRID)
    for _ in range(ZOOMS):
        bend = np.logaddexp(0.0, places[:, None] - x)
        middle = bend.mean(axis=1, keepdims=True)
        yb, bb = (bend - middle) @ (y - y.mean()), np.square(bend - middle).sum(axis=1)
        # RSS = sum (y0 + p bend0)^2, shape (places, powers).
        rss = np.square(y - y.mean()).sum() + 2 * powers * yb[:, None] + powers**2 * bb[:, None]
        rss = np.maximum(rss, 0.0)
        limit = (rss.min() + 1e-12 * n) * (1 + float(fdtri(1, n - 3, level)) / (n - 3))
        inside = rss <= limit
        where, found = places[inside.any(axis=1)], powers[inside.any(axis=0)]
        at, power = np.unravel_index(int(np.argmin(rss)), rss.shape)
        best = float(places[at]), float(powers[power])
        top = y.mean() + powers * middle
        room = np.sqrt(np.maximum(limit - rss, 0.0) / n)
        rates = float(top[at, power]), (top - room)[inside].min(), (top + room)[inside].max()
        # The best of a coarse grid is not the best: the next grid is finer about it.
        places, powers = _finer(where, places, edges), _finer(found, powers, POWERS)
    open_low, open_high = where[0] <= edges[0] + 1e-9, where[-1] >= edges[1] - 1e-9
    known = not (open_low or open_high)
    return RateLaw(
        exponent=Interval(
            point=best[1],
            low=float(found[0]) if found[0] > POWERS[0] else None,
            high=float(found[-1]) if found[-1] < POWERS[1] else None,
        ),
        saturation=Interval(
            point=float(np.exp(best[0])) if known else None,
            low=0.0 if open_low else float(np.exp(where[0])),
            high=None if open_high else float(np.exp(where[-1])),
        ),
        rate_max=Interval(
            point=float(np.exp(rates[0])) if known else None,
            low=float(np.exp(rates[1])),
            high=None if open_high else float(np.exp(rates[2])),
        ),
        rms_log_error=float(np.sqrt(rss.min() / n)),
        sizes=len(np.unique(x)),
        left_out=left_out,
        level=level,
        detail=_detail(open_low=bool(open_low), open_high=bool(open_high)),
    )


def _finer(inside: Array, before: Array, edges: tuple[float, float]) -> Array:
    step = float(before[1] - before[0])
    low = max(float(inside[0]) - step, edges[0])
    return np.linspace(low, min(float(inside[-1]) + step, edges[1]), GRID)


def _detail(*, open_low: bool, open_high: bool) -> str:
    if open_low and open_high:
        return "neither a power law nor a saturation shows: add batch sizes or repeats"
    if open_high:
        return "the best rate still grows at the largest batch size: no saturation shows"
    if open_low:
        return "the best rate hardly changes with the batch size: no exponent shows"
    return "the best rate grows as a power of the batch size, then saturates"
