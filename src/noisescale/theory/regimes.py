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
KNOTS = 61
"""Places tried for each end, on a logarithmic grid. (assumed)"""
ZOOMS = 4
"""Grids, each finer about what the one before left possible. (assumed)"""
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
        self.x, self.y, self.weight = x, y, pull**2
        margin = MARGIN * (x[-1] - x[0])
        self.edges = float(x[0] - margin), float(x[-1] + margin)

    def fit(self, starts: Array, ends: Array) -> None:
        """Solve for c and p at every start with every later end."""
        first, second = (table.ravel() for table in np.meshgrid(starts, ends, indexing="ij"))
        later = first <= second
        self.start, self.end = first[later], second[later]
        start, end, x = self.start[:, None], self.end[:, None], self.x
        gap = np.maximum(end - start, 1e-9)
        # Share of the way from the first end to the second.
        share = np.clip((x - start) / gap, 0, 1)
        shift = np.where(x < start, -x, -start * (1 - share))
        c, p, c_var, p_var = self._solve(1 - share, share, self.y - shift)
        # The middle piece falls, and not faster than in proportion.
        fall = c - self.start - p
        wrong = (fall < 0) | (fall > gap[:, 0])
        bound = np.where(fall < 0, 0.0, gap[:, 0])
        # At the bound p = c - start - bound: one level is left.
        offset = shift - share * (start + bound[:, None])
        level = (self.y - offset) @ self.weight / self.weight.sum()
        self.c = np.where(wrong, level, c)
        self.p = np.where(wrong, level - self.start - bound, p)
        fitted = (1 - share) * self.c[:, None] + share * self.p[:, None] + shift
        self.rss = (self.weight * np.square(self.y - fitted)).sum(axis=1)
        single = 1 / self.weight.sum()
        self.c_var = np.where(wrong, single, c_var)
        self.p_var = np.where(wrong, single, p_var)

    def _solve(self, u: Array, v: Array, y: Array) -> tuple[Array, Array, Array, Array]:
        w = self.weight
        # Where one level has no data the other is found alone.
        uu, vv = (w * u * u).sum(1) + 1e-9, (w * v * v).sum(1) + 1e-9
        uv, uy, vy = (w * u * v).sum(1), (w * u * y).sum(1), (w * v * y).sum(1)
        det = uu * vv - uv**2
        c, p = (vv * uy - uv * vy) / det, (uu * vy - uv * uy) / det
        return c, p, vv / det, uu / det

    def regimes(self, level: float) -> Regimes:
        from scipy.special import fdtri

        n = len(self.x)
        freedom = max(n - 4, 1)
        wider = 1 + float(fdtri(1, freedom, level)) / freedom
        starts = ends = np.linspace(*self.edges, KNOTS)
        for _ in range(ZOOMS):
            self.fit(starts, ends)
            # The best of a coarse grid is not the best: the next grid is finer about it.
            limit = (float(self.rss.min()) + 1e-12 * n) * wider
            inside = self.rss <= limit
            starts = self._finer(self.start[inside], starts)
            ends = self._finer(self.end[inside], ends)
        best = int(np.argmin(self.rss))
        start, end = float(self.start[best]), float(self.end[best])
        room = np.sqrt(np.maximum(limit - self.rss[inside], 0.0))
        slope = -float(self.c[best] - start - self.p[best]) / (end - start) if end > start else None
        first_seen = bool((self.start[inside] > self.x[0]).all())
        last_seen = bool((self.end[inside] < self.x[-1]).all())
        c = float(self.c[best]), self.c[inside], room * np.sqrt(self.c_var[inside])
        p = float(self.p[best]), self.p[inside], room * np.sqrt(self.p_var[inside])
        return Regimes(
            perfect_end=self._end(start, self.start[inside]),
            useful_end=self._end(end, self.end[inside]),
            examples=_level(*c, first_seen),
            plateau=_level(*p, last_seen),
            middle_slope=slope,
            small_slope=_free_slope(self.x, self.y, start, level),
            rms_log_error=float(np.sqrt(np.mean(np.square(self._rest(best))))),
            level=level,
            detail=_detail(start, end, self.x, open_=(not first_seen, not last_seen)),
        )

    def _finer(self, inside: Array, before: Array) -> Array:
        step = float(before[1] - before[0])
        low = max(float(inside.min()) - step, self.edges[0])
        return np.linspace(low, min(float(inside.max()) + step, self.edges[1]), KNOTS)

    def _end(self, best: float, inside: Array) -> Interval:
        """Return an end with its interval; one that reaches the grid's edge is open."""
        low, high = float(inside.min()), float(inside.max())
        shut = low > self.edges[0] + 1e-9, high < self.edges[1] - 1e-9
        known = all(shut) and self.x[0] <= best <= self.x[-1]
        return Interval(
            point=float(np.exp(best)) if known else None,
            low=float(np.exp(low)) if shut[0] else 0.0,
            high=float(np.exp(high)) if shut[1] else None,
        )

    def _rest(self, best: int) -> Array:
        start, end = self.start[best], self.end[best]
        share = np.clip((self.x - start) / max(end - start, 1e-9), 0, 1)
        flat = (1 - share) * (self.c[best] - start) + share * self.p[best]
        rest: Array = self.y - np.where(self.x < start, self.c[best] - self.x, flat)
        return rest


def _level(best: float, inside: Array, room: Array, seen: bool) -> Interval:
    """Return a level; where its regime may not have been seen only one side is known."""
    low, high = float(np.exp((inside - room).min())), float(np.exp((inside + room).max()))
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


def _detail(start: float, end: float, x: Array, *, open_: tuple[bool, bool]) -> str:
    low, high = f"{np.exp(x[0]):g}", f"{np.exp(x[-1]):g}"
    parts = []
    if start < x[0]:
        parts.append(f"perfect scaling ends below batch size {low}: add smaller sizes")
    if end > x[-1]:
        parts.append(f"steps still fall at batch size {high}: add larger sizes")
    # The best fit may show what the data do not settle: the intervals are open then.
    ways = ("smaller", "larger")
    room = [way for way, unsure in zip(ways, open_, strict=True) if unsure]
    if room and not parts:
        what = "the best fit shows three regimes, the intervals leave their ends open"
        return f"{what}: add {' and '.join(room)} sizes or more seeds"
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
