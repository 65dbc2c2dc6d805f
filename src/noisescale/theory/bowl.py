"""The smallest value of a smooth bowl through noisy points: log steps against log rate.

A local quadratic with a weak prior on its curvature. The smallest of noisy points is too small
(the winner's curse); the smallest value of a smooth curve through all of them is not, up to a
term that is known and taken off.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

CURVATURE, CURVATURE_SPREAD = 0.75, 0.6
"""Prior mean and deviation of the quadratic's coefficient in log steps per squared log rate:
steps proportional to (1/r + r)/2 give 0.5, (2/r + r^2)/3 gives 1. (assumed)"""
TWIST_SPREAD = 0.5
"""Prior deviation of a coefficient of a product of two coordinates. (assumed)"""
DEPARTURE = 0.3
"""A point z from the minimum departs from the quadratic by up to this times z^3, and counts so
much less: (1/r + r)/2 and (2/r + r^2)/3 depart by 0.08 z^4 and 0.33 z^3. (assumed)"""


class Bowl(NamedTuple):
    """The minimum of a bowl.

    Attributes:
        least: its value, the bias of a smallest value taken off.
        place: shape (dimensions,), where it is.
        weights: shape (points,), how much ``least`` moves with each point's value.
        error: standard error of ``least`` from the points' noise and the prior.
        model_error: the part of ``error`` that is not the points' noise.
        inside: whether the quadratic has its minimum within the points.
    """

    least: float
    place: Array
    weights: Array
    error: float
    model_error: float
    inside: bool


def lowest(
    *,
    places: Array,
    values: Array,
    noise: Array,
    bounded: Mask | None = None,
    low: Array | None = None,
    high: Array | None = None,
    gap: Array | None = None,
) -> Bowl:
    """Fit a local quadratic to noisy points and return its smallest value between them.

    Bayesian linear regression on 1, z_k, z_k^2 and products, z the distance from the lowest
    point; noise^2 + (0.3 d^3)^2 is the variance of a point at the distance d from the
    minimum; repeated until the minimum stays. The lowest point lies anywhere within half a gap
    of the minimum, or farther where the noise chose it: that is the prior of the slope.

    Two terms are added. A minimum fitted to noisy points lies too low by half the trace of the
    inverse second derivatives times the covariance of the slope. A slope that too few points
    tell, and the prior pulls to 0, leaves the minimum too high by the same expression.

    Args:
        places: shape (points, dimensions), coordinates (logarithms).
        values: shape (points,), log steps.
        noise: shape (points,), their standard errors; positive.
        bounded: shape (points,), True where the value is only a lower bound; default: nowhere.
        low: shape (dimensions,), where the minimum is looked for; default: between the points.
        high: shape (dimensions,), likewise.
        gap: shape (dimensions,), distance between neighbouring points; default: their mean.

    Returns:
        The bowl. With a single point its value and its noise.

    Source: Gaussian conjugate regression (Bishop 2006, section 3.3); the two terms are the
    second order of the expected minimum of a quadratic with a random slope.
    """
    late = np.zeros(len(values), dtype=bool) if bounded is None else bounded
    ours = places[~late]
    fit = _Fit(
        places=places,
        values=values,
        noise=noise,
        late=late,
        low=ours.min(axis=0) if low is None else low,
        high=ours.max(axis=0) if high is None else high,
        gap=_mean_gaps(places) if gap is None else gap,
    )
    centre = fit.anchor
    for _ in range(12):
        moved = fit.minimum(centre)
        if np.abs(moved - centre).max(initial=0.0) < 1e-4:
            break
        # Half steps: the weights follow the minimum, and could make it swing.
        centre = (centre + moved) / 2
    return fit.report(centre)


def _mean_gaps(places: Array) -> Array:
    lines = len(places) ** (1 / max(places.shape[1], 1))
    gaps: Array = np.ptp(places, axis=0) / max(lines - 1, 1.0)
    return gaps


class _Fit:
    def __init__(
        self,
        *,
        places: Array,
        values: Array,
        noise: Array,
        late: Mask,
        low: Array,
        high: Array,
        gap: Array,
    ) -> None:
        self.places, self.values, self.noise, self.late = places, values, noise, late
        self.low, self.high = low, high
        self.d = d = places.shape[1]
        first, second = np.triu_indices(d, 1)
        enough = len(places) >= 2 * (1 + 2 * d + len(first))
        self.pairs = (first, second) if enough else (first[:0], second[:0])
        at = np.flatnonzero(~late)[np.argmin(values[~late])]
        self.anchor = places[at]
        # Uniform within half a gap of the minimum; and a points' noise lower than its due.
        self.near = np.square(CURVATURE * gap) / 3
        self.slopes = self.near + 8 * CURVATURE * float(np.median(noise[~late]))

    def features(self, z: Array) -> Array:
        first, second = self.pairs
        parts = [np.ones((len(z), 1)), z, z**2, z[:, first] * z[:, second]]
        return np.concatenate(parts, axis=1)

    def variances(self, centre: Array) -> Array:
        far = np.linalg.norm(self.places - centre, axis=1)
        variance: Array = self.noise**2 + np.square(DEPARTURE * far**3)
        return variance

    def solve(self, centre: Array) -> tuple[Array, Array, Array]:
        """Return coefficients about the anchor, their covariance, and how values move them."""
        variance, d, pairs = self.variances(centre), self.d, len(self.pairs[0])
        X = self.features(self.places - self.anchor)
        spread = [CURVATURE_SPREAD**2] * d + [TWIST_SPREAD**2] * pairs
        self.prior = np.diag([0.0, *(1 / self.slopes), *(1 / np.array(spread))])
        mean = np.array([0.0] * (1 + d) + [CURVATURE] * d + [0.0] * pairs)
        told = ~self.late
        while True:
            heard = np.where(told, 1 / variance, 0.0)
            covariance = np.linalg.inv((X.T * heard) @ X + self.prior)
            gain = covariance @ (X.T * heard)
            beta = gain @ self.values + covariance @ self.prior @ mean
            # A bound that the curve passes by itself says nothing.
            broken = ~told & (X @ beta < self.values)
            if not broken.any():
                break
            told = told | broken
        return beta, np.asarray(covariance, dtype=np.float64), gain

    def minimum(self, centre: Array) -> Array:
        beta, _, _ = self.solve(centre)
        H, g = self.hessian(beta), beta[1 : 1 + self.d]
        z = np.zeros(self.d)
        low, high = self.low - self.anchor, self.high - self.anchor
        for _ in range(50 if self.d > 1 else 1):
            for k in range(self.d):
                rest = g[k] + H[k] @ z - H[k, k] * z[k]
                z[k] = np.clip(-rest / H[k, k], low[k], high[k])
        return np.asarray(self.anchor + z)

    def hessian(self, beta: Array) -> Array:
        """Second derivatives, the curvature kept positive along each coordinate."""
        d = self.d
        H = np.diag(2 * np.maximum(beta[1 + d : 1 + 2 * d], 0.05))
        for i, j, twist in zip(*self.pairs, beta[1 + 2 * d :], strict=True):
            # Products that would make a saddle of the bowl are cut down.
            most = 0.9 * np.sqrt(H[i, i] * H[j, j]) / (d - 1)
            H[i, j] = H[j, i] = np.clip(twist, -most, most)
        return H

    def report(self, centre: Array) -> Bowl:
        beta, covariance, gain = self.solve(centre)
        here = self.features((centre - self.anchor)[None])[0]
        weights = here @ gain
        # Slopes at the minimum: derivatives of the features there.
        first, second = self.pairs
        z, d = centre - self.anchor, self.d
        J = np.zeros((d, len(here)))
        J[:, 1 : 1 + d], J[:, 1 + d : 1 + 2 * d] = np.eye(d), np.diag(2 * z)
        columns = 1 + 2 * d + np.arange(len(first))
        J[first, columns], J[second, columns] = z[second], z[first]
        slope_noise = (J @ gain * self.noise**2) @ (J @ gain).T
        unknown = np.zeros_like(covariance)
        unknown[1 : 1 + d, 1 : 1 + d] = np.diag(self.near / self.slopes**2)
        untold = J @ covariance @ unknown @ covariance @ J.T
        H = self.hessian(beta)
        inside = bool(np.all((centre > self.low) & (centre < self.high)))
        too_low = 0.5 * float(np.trace(np.linalg.solve(H, slope_noise))) if inside and d else 0.0
        too_high = 0.5 * float(np.trace(np.linalg.solve(H, untold))) if d else 0.0
        sampling = float((weights**2 * self.noise**2).sum())
        # The square of a uniform variable scatters by 0.9 of its mean.
        total = float(here @ covariance @ here) + (0.9 * too_high) ** 2
        return Bowl(
            least=float(here @ beta) + too_low - too_high,
            place=centre,
            weights=weights,
            error=float(np.sqrt(total)),
            model_error=float(np.sqrt(max(total - sampling, 0.0))),
            inside=inside,
        )

    def left_over(self, centre: Array) -> tuple[float, float]:
        """Return the weighted sum of squares about the quadratic and its degrees of freedom."""
        beta, _, gain = self.solve(centre)
        X = self.features(self.places - self.anchor)
        share = self.noise**2 / self.variances(centre)
        used = np.einsum("ij,ji->i", X, gain)
        squares = float(share @ np.square(self.values - X @ beta))
        return squares, max(float(share @ (1 - used)), 0.0)


def residuals(*, places: Array, values: Array, noise: float, centre: Array) -> tuple[float, float]:
    """Return what the points near the minimum leave over about the quadratic.

    Args:
        places: shape (points, dimensions).
        values: shape (points,), log steps.
        noise: their standard error so far.
        centre: shape (dimensions,), the minimum.

    Returns:
        The weighted sum of squares and its degrees of freedom.
    """
    count = len(places)
    fit = _Fit(
        places=places,
        values=values,
        noise=np.full(count, noise),
        late=np.zeros(count, dtype=bool),
        low=places.min(axis=0),
        high=places.max(axis=0),
        gap=_mean_gaps(places),
    )
    return fit.left_over(centre)
