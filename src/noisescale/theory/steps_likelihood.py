"""The likelihood of the steps law S = Smin (1 + Bcrit/B), and its profile intervals.

In a = log(Smin) and b = log(Bcrit) the law is log S = a + log(1 + exp(b)/B), a straight shift
in a: for each b the best a and noise are found exactly, and one search over b does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

ROUNDING = 1e-6
"""Assumed least error of log(steps): keeps the likelihood finite where the law fits exactly."""
TAIL = 14.0
"""The search for log(Bcrit) ends this far outside the tested sizes, where the law is within
exp(-14), about 1e-6, of its limits (slope -1 and plateau)."""


class LogInterval(NamedTuple):
    """A logarithm with its interval; an open end is -inf or inf."""

    point: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ProfileIntervals:
    """Intervals of log Bcrit, log Smin, log Emin, and the fit's rms error of log(steps)."""

    critical: LogInterval
    steps_min: LogInterval
    examples_min: LogInterval
    rms: float


def profile_intervals(likelihood: StepsLikelihood, *, level: float) -> ProfileIntervals:
    """Project the region of high likelihood on log Bcrit, log Smin and log Emin.

    The region is where -2 log likelihood exceeds its minimum by at most
    n log(1 + F/(n - 2)), F the ``level`` quantile of F(1, n - 2), n the rows that reached the
    target. Without censored rows this is the region RSS <= RSS_min (1 + F/(n - 2)).

    Args:
        likelihood: of the data; at least 3 rows reached the target.
        level: confidence level of each interval, between 0 and 1.

    Returns:
        Points and intervals on the log scale.

    Source: Bates and Watts 1988, Nonlinear Regression Analysis, sections 6.1.2 and 6.1.3.
    """
    from scipy.special import fdtri

    best = likelihood.best()
    at_best = np.array([best])
    freedom = likelihood.reached - 2
    gap = likelihood.reached * np.log1p(float(fdtri(1, freedom, level)) / freedom)
    limit = float(likelihood.cost(at_best)[0]) + gap
    low, high = _critical(likelihood, best, limit)
    inner = max(low, likelihood.lowest), best, min(high, likelihood.highest)
    a_low, a_high, c_low, c_high = _projections(likelihood, *inner, limit)
    a = float(likelihood.centre(at_best)[0])
    return ProfileIntervals(
        critical=LogInterval(best, low, high),
        # An endless batch needs ever fewer steps, a vanishing one ever fewer examples.
        steps_min=LogInterval(a, a_low if np.isfinite(high) else -np.inf, a_high),
        examples_min=LogInterval(a + best, c_low if np.isfinite(low) else -np.inf, c_high),
        rms=likelihood.rms(best),
    )


class StepsLikelihood(ABC):
    """-2 log likelihood as a function of b = log(Bcrit), with a and the noise maximised out.

    Rows that reached the target come first.
    """

    def __init__(
        self, log_sizes: Array, log_steps: Array, reached: int, pull: Array | None = None
    ) -> None:
        self.log_sizes = log_sizes
        self.log_steps = log_steps
        self.reached = reached
        # Rows count by the inverse of their relative standard error; mean square 1 of reached.
        pull = np.ones(len(log_sizes)) if pull is None else pull
        self.pull, self.pull_open = pull[:reached], pull[reached:]
        self.squared_pull = np.square(self.pull)
        self.lowest = float(log_sizes.min()) - TAIL
        self.highest = float(log_sizes.max()) + TAIL

    @staticmethod
    def of(
        *,
        log_sizes: Array,
        log_steps: Array,
        censored: npt.NDArray[np.bool_],
        log_error: Array | None = None,
    ) -> StepsLikelihood:
        """Choose the likelihood for data of shape (n,); ``censored`` rows are lower bounds.

        The noise of a row is the unknown one times its ``log_error``, whose scale is of no
        matter.
        """
        order = np.argsort(censored, kind="stable")
        reached = int(np.count_nonzero(~censored))
        kind = _LeastSquares if reached == len(log_sizes) else _Tobit
        pull = None
        if log_error is not None:
            pull = 1 / log_error[order]
            pull = pull / np.sqrt(np.mean(np.square(pull[:reached])))
        return kind(log_sizes[order], log_steps[order], reached, pull)

    def best(self) -> float:
        """Return the b of highest likelihood, to about 1e-7."""
        grid = np.linspace(self.lowest, self.highest, 81)
        for _ in range(7):
            index = int(np.argmin(self.cost(grid)))
            grid = np.linspace(grid[max(index - 1, 0)], grid[min(index + 1, len(grid) - 1)], 21)
        return float(grid[10])

    def rms(self, b: float) -> float:
        """Return the root mean square error of log(steps) over rows that reached the target."""
        done, _ = self.lifted(np.array([b]))
        return float(np.sqrt(np.mean(np.square(done - self.centre(np.array([b]))))))

    def lifted(self, b: Array) -> tuple[Array, Array]:
        """Return log(steps) - log(1 + Bcrit/B), shape (len(b), rows), reached and censored."""
        lifted: Array = self.log_steps - np.logaddexp(0.0, b[:, None] - self.log_sizes)
        return lifted[:, : self.reached], lifted[:, self.reached :]

    def middle(self, done: Array) -> tuple[Array, Array]:
        """Return mean and variance of reached rows, shape (len(b),), each row by its weight."""
        mean: Array = (self.squared_pull * done).mean(axis=1)
        variance: Array = (self.squared_pull * np.square(done - mean[:, None])).mean(axis=1)
        return mean, variance

    @abstractmethod
    def centre(self, b: Array) -> Array:
        """Return the best a for each b."""

    @abstractmethod
    def cost(self, b: Array) -> Array:
        """Return -2 log likelihood at the best a and noise, up to a constant."""

    @abstractmethod
    def reach(self, b: Array, limit: float, side: Array) -> Array:
        """Return where in a, below (side -1) or above (1), the cost is ``limit``; NaN if never."""


@final
class _LeastSquares(StepsLikelihood):
    """Every row reached the target: closed form in everything but b."""

    def centre(self, b: Array) -> Array:
        return self.middle(self.lifted(b)[0])[0]

    def cost(self, b: Array) -> Array:
        cost: Array = self.reached * np.log(self.middle(self.lifted(b)[0])[1] + ROUNDING**2)
        return cost

    def reach(self, b: Array, limit: float, side: Array) -> Array:
        mean, variance = self.middle(self.lifted(b)[0])
        room = np.exp(limit / self.reached) - ROUNDING**2 - variance
        end: Array = mean + side * np.sqrt(np.where(room >= 0, room, np.nan))
        return end


@final
class _Tobit(StepsLikelihood):
    """Some rows are lower bounds: normal errors, right-censored.

    In t = 1/sigma and d = a/sigma the log likelihood is concave (Olsen 1978), and so it is in t
    for a fixed a: Newton's method with damped steps finds the one maximum.
    """

    def centre(self, b: Array) -> Array:
        return self._maximum(*self.lifted(b))[0]

    def cost(self, b: Array) -> Array:
        done, open_ = self.lifted(b)
        return self._cost(done, open_, *self._maximum(done, open_))

    def reach(self, b: Array, limit: float, side: Array) -> Array:
        done, open_ = self.lifted(b)
        a, t = self._maximum(done, open_)
        least = self._cost(done, open_, a, t)
        goal = np.sqrt(np.maximum(limit - least, 0.0))

        def rise(distance: Array) -> Array:
            nonlocal t
            end = a + side * distance
            t = self._best_scale(done, open_, end, t)
            root: Array = np.sqrt(np.maximum(self._cost(done, open_, end, t) - least, 0.0))
            return root

        # This root is nearly a straight line through 0 in the distance: few steps are needed.
        distance = _solve_rising(rise, goal, guess=goal / (t * np.sqrt(self.reached)) + ROUNDING)
        return np.where(least <= limit, a + side * distance, np.nan)

    def _cost(self, done: Array, open_: Array, a: Array, t: Array) -> Array:
        from scipy.special import log_ndtr

        square = self._square(done, a)
        late = log_ndtr(-t[:, None] * self.pull_open * (open_ - a[:, None])).sum(axis=1)
        cost: Array = t**2 * square - 2 * self.reached * np.log(t) - 2 * late
        return cost

    def _maximum(self, done: Array, open_: Array) -> tuple[Array, Array]:
        """Return the best (a, t) for each b."""
        centre, variance = self.middle(done)
        c = self.pull_open * (open_ - centre[:, None])
        square = self.reached * (variance + ROUNDING**2)
        t, d = np.sqrt(self.reached / square), np.zeros(len(done))
        for _ in range(100):
            h, w = _hazard(t[:, None] * c - self.pull_open * d[:, None])
            # Reached rows are centred: they leave no cross term between t and d.
            slope_t = self.reached / t - t * square - (h * c).sum(axis=1)
            slope_d = -self.reached * d + (h * self.pull_open).sum(axis=1)
            tt = self.reached / t**2 + square + (w * c**2).sum(axis=1)
            dd = self.reached + (w * self.pull_open**2).sum(axis=1)
            td = -(w * c * self.pull_open).sum(axis=1)
            det = tt * dd - td**2
            step_t = (dd * slope_t - td * slope_d) / det
            step_d = (tt * slope_d - td * slope_t) / det
            pace, finished = _pace(step_t * slope_t + step_d * slope_d)
            t, d = t + pace * step_t, d + pace * step_d
            if finished:
                break
        return centre + d / t, t

    def _square(self, done: Array, a: Array) -> Array:
        square: Array = (self.squared_pull * np.square(done - a[:, None])).sum(axis=1)
        return square + self.reached * ROUNDING**2

    def _best_scale(self, done: Array, open_: Array, a: Array, t: Array) -> Array:
        """Return the best t at fixed a for each b, starting from ``t``."""
        c = self.pull_open * (open_ - a[:, None])
        square = self._square(done, a)
        for _ in range(100):
            h, w = _hazard(t[:, None] * c)
            slope = self.reached / t - t * square - (h * c).sum(axis=1)
            curve = self.reached / t**2 + square + (w * c**2).sum(axis=1)
            pace, finished = _pace(slope**2 / curve)
            t = t + pace * slope / curve
            if finished:
                break
        return t


def _hazard(z: Array) -> tuple[Array, Array]:
    """Return h = phi(z)/Phi(-z), the slope of -log Phi(-z), and its own slope h (h - z)."""
    from scipy.special import erfcx

    h: Array = np.sqrt(2 / np.pi) / erfcx(z / np.sqrt(2))
    return h, h * (h - z)


def _pace(squared_decrement: Array) -> tuple[Array, bool]:
    """Return the damping of a Newton step, 1/(1 + decrement) far out, and whether it is the last.

    Half the squared decrement is what the step gains: after one from 1e-4 about 1e-16 is left.
    The term log(t) of the likelihood is self-concordant: damped so, t stays positive.
    """
    decrement = np.sqrt(np.maximum(squared_decrement, 0.0))
    return np.where(decrement < 0.25, 1.0, 1 / (1 + decrement)), bool(decrement.max() < 1e-4)


def _solve_rising(rise: Callable[[Array], Array], goal: Array, *, guess: Array) -> Array:
    """Solve rise(x) = goal for x > 0, rise(0) = 0 and rising, to 1e-5 (Illinois method)."""
    left, f_left = np.zeros_like(guess), -goal
    right, f_right = guess, rise(guess) - goal
    for _ in range(60):
        short = f_right < 0
        if not short.any():
            break
        left, f_left = np.where(short, right, left), np.where(short, f_right, f_left)
        right = np.where(short, right * np.clip(1.2 * goal / (f_right + goal), 1.2, 4), right)
        f_right = rise(right) - goal
    middle = right
    for _ in range(60):
        middle = right - f_right * (right - left) / np.maximum(f_right - f_left, 1e-300)
        value = rise(middle) - goal
        if np.all(np.abs(value) < 1e-5):
            break
        over = value >= 0
        # The end that stays is halved, or one side would be approached for ever.
        f_left, f_right = np.where(over, f_left / 2, value), np.where(over, value, f_right / 2)
        left, right = np.where(over, left, middle), np.where(over, middle, right)
    return middle


def _critical(likelihood: StepsLikelihood, best: float, limit: float) -> tuple[float, float]:
    """Find the outermost b whose cost stays below the limit; infinite where all do."""
    near = np.geomspace(1e-7, likelihood.highest - likelihood.lowest, 40)
    even = np.linspace(likelihood.lowest, likelihood.highest, 41)
    grid = np.concatenate([even, best - near, [best], best + near])
    grid = np.unique(np.clip(grid, likelihood.lowest, likelihood.highest))
    inside = np.flatnonzero(likelihood.cost(grid) <= limit)
    first, last = int(inside[0]), int(inside[-1])
    low, high = -np.inf, np.inf
    if first > 0:
        low = _crossing(likelihood, grid[first - 1], grid[first], limit)
    if last < len(grid) - 1:
        high = _crossing(likelihood, grid[last + 1], grid[last], limit)
    return low, high


def _crossing(likelihood: StepsLikelihood, outside: float, inside: float, limit: float) -> float:
    """Narrow down where the cost crosses the limit, by a factor 20 a round."""
    for _ in range(4):
        grid = np.linspace(outside, inside, 21)
        within = np.append(likelihood.cost(grid[1:-1]) <= limit, True)
        first = int(np.argmax(within)) + 1
        outside, inside = float(grid[first - 1]), float(grid[first])
    return inside


def _projections(
    likelihood: StepsLikelihood, low: float, best: float, high: float, limit: float
) -> list[float]:
    """Return the least and greatest a, then the least and greatest a + b, of the region."""
    # Finer towards the ends, where the region closes like a circle.
    grid = (low + high) / 2 - (high - low) / 2 * np.cos(np.linspace(0, np.pi, 25))
    points = np.tile(np.sort(np.append(grid, best)), (4, 1))
    side = np.array([[-1.0], [1.0], [-1.0], [1.0]])
    slope = np.array([[0.0], [0.0], [1.0], [1.0]])
    for _ in range(3):
        sides = np.broadcast_to(side, points.shape)
        ends = likelihood.reach(points.ravel(), limit, sides.ravel()).reshape(points.shape)
        ahead = side * (ends + slope * points)
        top = np.nanargmax(ahead, axis=1)
        extremes = [float(x) for x in side[:, 0] * ahead[np.arange(4), top]]
        before, after = np.maximum(top - 1, 0), np.minimum(top + 1, points.shape[1] - 1)
        rows = np.arange(4)
        points = np.linspace(points[rows, before], points[rows, after], 9, axis=1)
    return extremes
