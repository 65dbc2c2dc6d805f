"""Confidence sets for the noise scale: what a series of steps can say, and what it cannot.

The set is built for phi = |G|^2 / tr(Sigma), whose denominator is never near zero, by
inverting a test of mean(|G|^2 - phi tr(Sigma)) = 0 (Fieller 1954). A value of phi is
rejected only where Student's t and Hall's skewness-corrected t both reject it: squared norms
are skewed, and with few steps Student's t alone covers 89 % at a covariance of rank one.
The noise scale's set is the image under 1/phi; where phi = 0 is not rejected it is a
half-line. The choice was made by measured coverage: benchmarks/coverage.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError
from noisescale.records import Outcome

Array = npt.NDArray[np.float64]

MIN_STEPS = 10
"""Fewer measured steps give no interval. Measured: at 10 steps the sets still cover 91 % at
rank one and 93 % elsewhere; below, the skewness cannot be estimated at all."""

_BISECTIONS = 60


@dataclass(frozen=True, kw_only=True)
class RatioEstimate:
    """A noise scale with its set.

    Attributes:
        outcome: how far the measurement got.
        b_simple: ratio of the means, examples; None unless determined.
        low: lower end of the set, examples; None where none can be given.
        high: upper end; None means unbounded when ``low`` is given.
        level: confidence level.
        grad_sq: mean of the unbiased |G|^2 (never clamped).
        trace_cov: mean of the unbiased tr(Sigma).
        detail: one sentence that explains the outcome.
    """

    outcome: Outcome
    b_simple: float | None
    low: float | None
    high: float | None
    level: float
    grad_sq: float | None
    trace_cov: float | None
    detail: str


def estimate_moving(
    *,
    grad_sq: npt.ArrayLike,
    trace_cov: npt.ArrayLike,
    examples: npt.ArrayLike,
    level: float = 0.95,
) -> RatioEstimate:
    """Estimate the noise scale over steps whose weights may move.

    The estimand is the ratio of the window's mean true values. Given the weights, the errors
    of successive steps are uncorrelated (each batch is fresh), however strongly the true
    values are autocorrelated; so no block length enters. Where the series drifts (von
    Neumann's ratio), the variance is taken from successive differences, which leave the
    drift out.

    Args:
        grad_sq: shape (T,), unbiased |G|^2 of each measured step.
        trace_cov: shape (T,), unbiased tr(Sigma) of each measured step.
        examples: shape (T,), examples of each step: its weight in both means.
        level: confidence level in (0, 1).

    Returns:
        The ratio of means with its set. A set without any positive noise scale (|G|^2 below
        0 by more than chance allows at this level) is reported as too few steps.

    Raises:
        InvalidInputError: the shapes differ or the level is not in (0, 1).

    Source: Fieller 1954, J. R. Stat. Soc. B 16; Hall 1992, J. R. Stat. Soc. B 54, eq. 2.5;
    von Neumann 1941, Ann. Math. Stat. 12.
    """
    g = np.atleast_1d(np.asarray(grad_sq, np.float64))
    s = np.atleast_1d(np.asarray(trace_cov, np.float64))
    w = np.broadcast_to(np.asarray(examples, np.float64), g.shape)
    _require(g, s, level)
    if len(g) == 0:
        return _without_set(Outcome.TOO_FEW_STEPS, None, None, level, "no step was measured")
    mean_g, mean_s = float(np.average(g, weights=w)), float(np.average(s, weights=w))
    if len(g) < MIN_STEPS:
        detail = f"{len(g)} measured steps; an interval needs at least {MIN_STEPS}"
        return _without_set(Outcome.TOO_FEW_STEPS, mean_g, mean_s, level, detail)
    if mean_s <= 0:
        return without_noise(mean_g, level)
    low, high = moving_set(grad_sq=g[None], trace_cov=s[None], examples=w[None], level=level)
    return from_set(mean_g, mean_s, float(low[0]), float(high[0]), level)


def moving_set(
    *, grad_sq: Array, trace_cov: Array, examples: Array, level: float
) -> tuple[Array, Array]:
    """Compute the set for phi = |G|^2 / tr(Sigma) of many series at once.

    Args:
        grad_sq: shape (R, T), R independent series of T steps.
        trace_cov: shape (R, T).
        examples: shape (R, T) or broadcastable: weights.
        level: confidence level.

    Returns:
        (low, high) of phi, each of shape (R,); either may be negative, high may be infinite.

    Source: see :func:`estimate_moving`.
    """
    from scipy.special import stdtrit

    moments = _Moments.of(grad_sq, trace_cov, examples)
    quantile = float(stdtrit(moments.steps - 1, (1 + level) / 2))
    point = moments.mean_g / moments.mean_s
    high = _limit(moments, point, quantile, upward=True)
    low = _limit(moments, point, quantile, upward=False)
    return low, high


@dataclass(frozen=True)
class _Moments:
    """Central moments of (g, s): those of g - phi s are polynomials in phi."""

    steps: int
    mean_g: Array
    mean_s: Array
    second: tuple[Array, Array, Array]
    variance: tuple[Array, Array, Array]
    third: tuple[Array, Array, Array, Array]

    @classmethod
    def of(cls, grad_sq: Array, trace_cov: Array, examples: Array) -> _Moments:
        w = np.broadcast_to(examples, grad_sq.shape)
        w = w / w.mean(axis=-1, keepdims=True)
        g, s = grad_sq * w, trace_cov * w
        mean_g, mean_s = g.mean(-1), s.mean(-1)
        # Deviations from w times the mean, not from the mean: a large batch is no outlier.
        dg, ds = g - w * mean_g[..., None], s - w * mean_s[..., None]
        second = tuple((a * b).mean(-1) for a, b in ((dg, dg), (dg, ds), (ds, ds)))
        third = tuple(
            (a * b * c).mean(-1)
            for a, b, c in ((dg, dg, dg), (dg, dg, ds), (dg, ds, ds), (ds, ds, ds))
        )
        variance = cls._step_variance(dg, ds, second, mean_g / mean_s)
        return cls(grad_sq.shape[-1], mean_g, mean_s, second, variance, third)

    @staticmethod
    def _step_variance(
        dg: Array, ds: Array, second: tuple[Array, ...], phi: Array
    ) -> tuple[Array, Array, Array]:
        """Per-step (co)variances: from differences where the series drifts."""
        steps = dg.shape[-1]
        eg, es = np.diff(dg), np.diff(ds)
        scale = 2 * (steps - 1)
        differences = [(a * b).sum(-1) / scale for a, b in ((eg, eg), (eg, es), (es, es))]
        plain = [moment * steps / (steps - 1) for moment in second]
        ratio = _quadratic(differences, phi) / np.maximum(_quadratic(plain, phi), 1e-300)
        # Under independence the ratio is 1 with variance about 1/T; 2.33 is the 1 % point.
        drifts = ratio < 1 - 2.33 / np.sqrt(steps)
        chosen = [np.where(drifts, a, b) for a, b in zip(differences, plain, strict=True)]
        return chosen[0], chosen[1], chosen[2]

    def statistics(self, phi: Array) -> tuple[Array, Array]:
        """Student's t and Hall's transformed t of mean(g - phi s) = 0."""
        mean = self.mean_g - phi * self.mean_s
        # A series without any noise has a set of almost no width, not a division by zero.
        floor = (1e-9 * (np.abs(self.mean_g) + np.abs(phi * self.mean_s))) ** 2 + 1e-100
        variance = np.maximum(_quadratic(self.variance, phi), floor)
        spread = np.maximum(_quadratic(self.second, phi), floor)
        a, b, c, d = self.third
        skewness = (a - 3 * phi * b + 3 * phi**2 * c - phi**3 * d) / spread**1.5
        x = mean / np.sqrt(variance)
        root = np.sqrt(self.steps)
        hall = x + skewness * x**2 / 3 + skewness**2 * x**3 / 27 + skewness / (6 * self.steps)
        return root * x, root * hall


def _quadratic(coefficients: tuple[Array, ...] | list[Array], phi: Array) -> Array:
    return coefficients[0] - 2 * phi * coefficients[1] + phi**2 * coefficients[2]


def _limit(moments: _Moments, point: Array, quantile: float, *, upward: bool) -> Array:
    """Walk from the point estimate until both statistics reject, then bisect."""
    sign = 1.0 if upward else -1.0

    def accepted(phi: Array) -> npt.NDArray[np.bool_]:
        t, hall = moments.statistics(phi)
        return np.asarray((sign * t > -quantile) | (sign * hall > -quantile))

    scale = np.sqrt(np.maximum(_quadratic(moments.variance, point), 0) / moments.steps)
    step = np.maximum(scale / np.abs(moments.mean_s), np.abs(point) * 1e-12 + 1e-300)
    inside, outside = point.copy(), point + sign * step
    open_ended = np.ones(point.shape, bool)
    for _ in range(_BISECTIONS):
        still = accepted(outside) & open_ended
        open_ended = still
        if not still.any():
            break
        inside = np.where(still, outside, inside)
        step = np.where(still, 2 * step, step)
        outside = np.where(still, outside + sign * step, outside)
    for _ in range(_BISECTIONS):
        middle = (inside + outside) / 2
        good = accepted(middle)
        inside, outside = np.where(good, middle, inside), np.where(good, outside, middle)
    return np.where(open_ended, sign * np.inf, inside)


def from_set(
    grad_sq: float, trace_cov: float, low: float, high: float, level: float
) -> RatioEstimate:
    """Turn a set for phi = |G|^2 / tr(Sigma) into one for the noise scale 1/phi.

    Args:
        grad_sq: mean of |G|^2.
        trace_cov: mean of tr(Sigma).
        low: lower end of phi.
        high: upper end of phi, may be infinite.
        level: confidence level.

    Returns:
        determined where low > 0; a lower bound where phi = 0 belongs to the set; too few
        steps where no positive phi does.
    """
    if not (np.isfinite(grad_sq) and np.isfinite(trace_cov)):
        return _without_set(Outcome.NOT_FINITE, None, None, level, "the moments are not finite")
    if high <= 0:
        detail = (
            "the estimate of |G|^2 lies below 0 by more than chance allows at this level, so no"
            " bound can be given; measure more steps, or examples that are independent"
        )
        return _without_set(Outcome.TOO_FEW_STEPS, grad_sq, trace_cov, level, detail)
    smallest = 0.0 if np.isinf(high) else 1 / high
    if low > 0:
        return RatioEstimate(
            outcome=Outcome.DETERMINED,
            b_simple=trace_cov / grad_sq,
            low=smallest,
            high=1 / low,
            level=level,
            grad_sq=grad_sq,
            trace_cov=trace_cov,
            detail="",
        )
    return RatioEstimate(
        outcome=Outcome.LOWER_BOUND,
        b_simple=None,
        low=smallest,
        high=None,
        level=level,
        grad_sq=grad_sq,
        trace_cov=trace_cov,
        detail="|G|^2 cannot be told from 0 at this level; more steps or larger batches would",
    )


def without_noise(grad_sq: float, level: float) -> RatioEstimate:
    """Report a trace of exactly zero: no noise, or no gradient at all.

    Args:
        grad_sq: mean of |G|^2, at least 0.
        level: confidence level.

    Returns:
        A noise scale of 0 where there is a gradient; unsupported where every gradient is zero.
    """
    if grad_sq == 0:
        detail = (
            "every gradient is exactly zero: the loss does not depend on the trainable parameters"
            " here; start from other weights or check the loss"
        )
        return _without_set(Outcome.UNSUPPORTED, 0.0, 0.0, level, detail)
    return RatioEstimate(
        outcome=Outcome.DETERMINED,
        b_simple=0.0,
        low=0.0,
        high=0.0,
        level=level,
        grad_sq=grad_sq,
        trace_cov=0.0,
        detail="all gradients are equal: there is no noise",
    )


def _without_set(
    outcome: Outcome, grad_sq: float | None, trace_cov: float | None, level: float, detail: str
) -> RatioEstimate:
    return RatioEstimate(
        outcome=outcome,
        b_simple=None,
        low=None,
        high=None,
        level=level,
        grad_sq=grad_sq,
        trace_cov=trace_cov,
        detail=detail,
    )


def _require(grad_sq: Array, trace_cov: Array, level: float) -> None:
    if grad_sq.shape != trace_cov.shape or grad_sq.ndim != 1:
        raise InvalidInputError(
            f"shapes {grad_sq.shape} and {trace_cov.shape}",
            "one |G|^2 and one tr(Sigma) per step are required",
            "pass two arrays of equal length",
        )
    if not 0 < level < 1:
        raise InvalidInputError(f"level {level}", "a number in (0, 1) is required", "pass 0.95")
