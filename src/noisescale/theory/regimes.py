"""The three regimes of data parallelism: straight pieces of log steps against log batch size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError
from noisescale.records import Interval, Regimes
from noisescale.theory.runs_checked import checked_runs, positive

Array = npt.NDArray[np.float64]

MIN_SIZES = 5
"""Batch sizes that must have reached the target: four parameters and one to check."""
KNOTS = 121
"""Places tried for each end, on a logarithmic grid. (assumed)"""
MARGIN = 0.35
"""The grid of ends passes the tested sizes by this share of their range, so that an end that
was not seen shows as open. (assumed)"""
NOTHING = Interval(point=None, low=None, high=None)


def fit_regimes(
    *,
    batch_size: npt.ArrayLike,
    steps: npt.ArrayLike,
    log_error: npt.ArrayLike | None = None,
    level: float = 0.95,
) -> Regimes:
    """Fit perfect scaling, diminishing returns and the plateau to tuned steps.

    log S = c - log B up to the end of perfect scaling, p from the end of useful scaling on, and
    a straight line between them. For given ends c and p are found by least squares, so a grid
    over both ends finds the rest. An interval holds the values for which some fit has a sum of
    squares of at most RSS_min (1 + F/(n - 4)), F the quantile of F(1, n - 4).

    Args:
        batch_size: shape (n,), sizes that reached the target; positive.
        steps: shape (n,), their tuned steps; positive.
        log_error: shape (n,), standard errors of log(steps), whose ratios alone count.
        level: confidence level, between 0 and 1.

    Returns:
        The regimes. An end beyond the tested sizes is open (None above, 0 below).

    Raises:
        InvalidInputError: shapes differ, a value is not positive, or the level is not between
            0 and 1.

    Source: the three regimes are those of Shallue et al. 2019, section 4.1; the fit in pieces
    is ours, its intervals as in Bates and Watts 1988, section 6.1.

    >>> sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    >>> fit = fit_regimes(batch_size=sizes, steps=[max(800 / b, 100 / (b / 8) ** 0.5, 50)
    ...                                            for b in sizes])
    >>> round(fit.perfect_end.point), round(fit.useful_end.point)
    (8, 32)
    """
    sizes, logs, _ = checked_runs(batch_size, steps, None, level)
    errors = np.ones(len(sizes)) if log_error is None else positive("log_error", log_error)
    if errors.shape != sizes.shape:
        raise InvalidInputError(
            f"log_error of shape {errors.shape}", "one for each size is required", "check it"
        )
    order = np.argsort(sizes, kind="stable")
    x, y, pull = np.log(sizes[order]), logs[order], 1 / errors[order]
    if len(np.unique(x)) < MIN_SIZES:
        return _nothing(level, f"{len(np.unique(x))} batch sizes reached the target; at least "
                        f"{MIN_SIZES} are needed: add batch sizes")  # fmt: skip
    return _Grid(x, y, pull / np.sqrt(np.mean(pull**2))).regimes(level)


class _Grid:
    """Least squares for every pair of ends."""

    def __init__(self, x: Array, y: Array, pull: Array) -> None:
        self.x, self.y, self.pull = x, y, pull
        margin = MARGIN * (x[-1] - x[0])
        self.knots = np.linspace(x[0] - margin, x[-1] + margin, KNOTS)
        first, second = np.triu_indices(KNOTS)
        self.first, self.second = first, second
        self.fit(self.knots[first][:, None], self.knots[second][:, None])

    def fit(self, start: Array, end: Array) -> None:
        """Solve for c and p; shape (pairs,) each."""
        x = self.x
        # Share of the way from the first end to the second.
        gap = np.maximum(end - start, 1e-9)
        share = np.clip((x - start) / gap, 0, 1)
        shift = -np.minimum(x, start) * (x < start) - start * (x >= start) * (1 - share)
        c, p = self._solve(1 - share, share, self.y - shift)
        # The middle piece falls, and not faster than in proportion.
        fall = c - start[:, 0] - p
        wrong = (fall < 0) | (fall > gap[:, 0])
        bound = np.where(fall < 0, 0.0, gap[:, 0])
        # At the bound p = c - start - bound: one level is left.
        offset = shift - share * (start + bound[:, None])
        weight = self.pull**2 / np.sum(self.pull**2)
        level = (self.y - offset) @ weight
        c = np.where(wrong, level, c)
        p = np.where(wrong, level - start[:, 0] - bound, p)
        fitted = (1 - share) * c[:, None] + share * p[:, None] + shift
        self.c, self.p = c, p
        self.rss = np.square(self.pull * (self.y - fitted)).sum(axis=1)

    def _solve(self, u: Array, v: Array, y: Array) -> tuple[Array, Array]:
        w = self.pull**2
        uu, vv, uv = (w * u * u).sum(1), (w * v * v).sum(1), (w * u * v).sum(1)
        uy, vy = (w * u * y).sum(1), (w * v * y).sum(1)
        # Where one level has no data the other is found alone.
        small = 1e-9
        det = (uu + small) * (vv + small) - uv**2
        return ((vv + small) * uy - uv * vy) / det, ((uu + small) * vy - uv * uy) / det

    def regimes(self, level: float) -> Regimes:
        from scipy.special import fdtri

        n, best = len(self.x), int(np.argmin(self.rss))
        start, end = self.knots[self.first], self.knots[self.second]
        freedom = max(n - 4, 1)
        floor = 1e-12 * n
        limit = (self.rss[best] + floor) * (1 + float(fdtri(1, freedom, level)) / freedom)
        inside = self.rss <= limit
        edges = self.knots[0], self.knots[-1]
        rms = float(np.sqrt(np.mean(np.square(self._rest(best)))))
        gap = float(end[best] - start[best])
        slope = -float(self.c[best] - start[best] - self.p[best]) / gap if gap > 1e-6 else None
        shown = self.x[0] < start, end < self.x[-1]
        return Regimes(
            perfect_end=_interval(start[best], start[inside], *edges, self.x),
            useful_end=_interval(end[best], end[inside], *edges, self.x),
            examples=_level(self.c[best], self.c[inside], bool(shown[0][inside].all())),
            plateau=_level(self.p[best], self.p[inside], bool(shown[1][inside].all())),
            middle_slope=slope,
            small_slope=_free_slope(self.x, self.y, float(start[best]), level),
            rms_log_error=rms,
            level=level,
            detail=_detail(start[best], end[best], self.x),
        )

    def _rest(self, best: int) -> Array:
        start, end = self.knots[self.first[best]], self.knots[self.second[best]]
        share = np.clip((self.x - start) / max(end - start, 1e-9), 0, 1)
        line = np.where(self.x < start, self.c[best] - self.x, self.c[best] - start)
        fitted = np.where(
            self.x < start, line, (1 - share) * (self.c[best] - start) + share * self.p[best]
        )
        rest: Array = self.y - fitted
        return rest


def _interval(best: float, inside: Array, lowest: float, highest: float, x: Array) -> Interval:
    """Return a point with its ends; one that reaches the grid's end is open."""
    low, high = float(inside.min()), float(inside.max())
    shut = low > lowest + 1e-9, high < highest - 1e-9
    point = float(np.exp(best)) if all(shut) and x[0] <= best <= x[-1] else None
    return Interval(
        point=point,
        low=float(np.exp(low)) if shut[0] else 0.0,
        high=float(np.exp(high)) if shut[1] else None,
    )


def _level(best: float, inside: Array, seen: bool) -> Interval:
    """Return a level; where its regime may not have been seen only one side is known."""
    low, high = float(np.exp(inside.min())), float(np.exp(inside.max()))
    if seen:
        return Interval(point=float(np.exp(best)), low=low, high=high)
    # Without a plateau steps may fall on; without perfect scaling examples may.
    return Interval(point=None, low=0.0, high=high)


def _free_slope(x: Array, y: Array, end: float, level: float) -> Interval:
    """Fit a slope to the sizes below the end of perfect scaling."""
    from scipy.special import stdtrit

    few = x <= end + 1e-9
    n = int(few.sum())
    if len(np.unique(x[few])) < 3:
        return NOTHING
    u = x[few] - x[few].mean()
    slope = float(u @ y[few] / (u @ u))
    rest = float(np.square(y[few] - y[few].mean() - slope * u).sum())
    half = float(stdtrit(n - 2, (1 + level) / 2)) * np.sqrt(rest / (n - 2) / (u @ u))
    return Interval(point=slope, low=slope - half, high=slope + half)


def _detail(start: float, end: float, x: Array) -> str:
    low, high = f"{np.exp(x[0]):g}", f"{np.exp(x[-1]):g}"
    parts = []
    if start < x[0]:
        parts.append(f"perfect scaling ends below batch size {low}: add smaller sizes")
    if end > x[-1]:
        parts.append(f"steps still fall at batch size {high}: add larger sizes")
    return "; ".join(parts) or "all three regimes were seen"


def _nothing(level: float, detail: str) -> Regimes:
    return Regimes(
        perfect_end=NOTHING,
        useful_end=NOTHING,
        examples=NOTHING,
        plateau=NOTHING,
        middle_slope=None,
        small_slope=NOTHING,
        rms_log_error=None,
        level=level,
        detail=detail,
    )
