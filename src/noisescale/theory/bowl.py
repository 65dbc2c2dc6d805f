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

CURVATURE, CURVATURE_SPREAD = 0.6, 0.6
"""Prior mean and deviation of the quadratic's coefficient in log steps per squared log rate:
steps proportional to (1/r + r)/2 give 0.5, (2/r + r^2)/3 gives 1. (assumed)"""
SLOPE_SPREAD = 1.0
"""Prior deviation of the slope: steps fall at most in proportion to the rate. (assumed)"""
TWIST_SPREAD = 0.5
"""Prior deviation of a coefficient of a product of two coordinates. (assumed)"""
DEPARTURE = 0.15
"""A point z from the minimum departs from the quadratic by about this times z^3, and counts so
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


def lowest(*, places: Array, values: Array, noise: Array, bounded: Mask | None = None) -> Bowl:
    """Fit a local quadratic to noisy points and return its smallest value between them.

    Bayesian linear regression on 1, z_k, z_k^2 and products, z the distance from the current
    minimum, noise^2 + (0.15 |z|^3)^2 the variance of a point; repeated until the minimum stays.
    A minimum fitted to noisy data lies too low by half the trace of the inverse curvature times
    the variance of the slope: that is added.

    Args:
        places: shape (points, dimensions), coordinates (logarithms).
        values: shape (points,), log steps.
        noise: shape (points,), their standard errors; positive.
        bounded: shape (points,), True where the value is only a lower bound; default: nowhere.

    Returns:
        The bowl. With a single point its value and its noise.

    Source: Gaussian conjugate regression (Bishop 2006, section 3.3); the bias is the second
    order term of E[min] for a quadratic with a random slope.
    """
    late = np.zeros(len(values), dtype=bool) if bounded is None else bounded
    fit = _Fit(places, values, noise, late)
    centre = places[np.flatnonzero(~late)[np.argmin(values[~late])]]
    for _ in range(12):
        moved = fit.minimum(centre)
        if np.abs(moved - centre).max(initial=0.0) < 1e-4:
            break
        # Half steps: the weights follow the minimum, and could make it swing.
        centre = (centre + moved) / 2
    return fit.report(centre)


class _Fit:
    def __init__(self, places: Array, values: Array, noise: Array, late: Mask) -> None:
        self.places, self.values, self.noise, self.late = places, values, noise, late
        points, dimensions = places.shape
        first, second = np.triu_indices(dimensions, 1)
        terms = 1 + 2 * dimensions + len(first)
        self.pairs = (first, second) if points >= 2 * terms else (first[:0], second[:0])
        ours = places[~late]
        self.low, self.high = ours.min(axis=0), ours.max(axis=0)

    def features(self, z: Array) -> Array:
        first, second = self.pairs
        parts = [np.ones((len(z), 1)), z, z**2, z[:, first] * z[:, second]]
        return np.concatenate(parts, axis=1)

    def solve(self, centre: Array) -> tuple[Array, Array, Array]:
        """Return coefficients, their covariance, and their gradient with the values."""
        z = self.places - centre
        d = z.shape[1]
        variance = self.noise**2 + (DEPARTURE * np.linalg.norm(z, axis=1) ** 3) ** 2
        X = self.features(z)
        spread = [SLOPE_SPREAD] * d + [CURVATURE_SPREAD] * d + [TWIST_SPREAD] * len(self.pairs[0])
        prior = np.diag([0.0, *(1 / s**2 for s in map(float, spread))])
        mean = np.zeros(X.shape[1])
        mean[1 + d : 1 + 2 * d] = CURVATURE
        told = ~self.late
        while True:
            heard = np.where(told, 1 / variance, 0.0)
            covariance = np.asarray(np.linalg.inv((X.T * heard) @ X + prior), dtype=np.float64)
            gain = covariance @ (X.T * heard)
            beta = gain @ self.values + covariance @ prior @ mean
            # A bound that the curve passes by itself says nothing.
            broken = ~told & (X @ beta < self.values)
            if not broken.any():
                break
            told = told | broken
        return beta, covariance, gain

    def minimum(self, centre: Array) -> Array:
        beta, _, _ = self.solve(centre)
        d = len(centre)
        H, g = self.hessian(beta, d), beta[1 : 1 + d]
        z = np.zeros(d)
        low, high = self.low - centre, self.high - centre
        for _ in range(50):
            for k in range(d):
                rest = g[k] + H[k] @ z - H[k, k] * z[k]
                z[k] = np.clip(-rest / H[k, k], low[k], high[k])
        return np.asarray(centre + z)

    def hessian(self, beta: Array, d: int) -> Array:
        """Second derivatives, the curvature kept positive along each coordinate."""
        H = np.diag(2 * np.maximum(beta[1 + d : 1 + 2 * d], 0.05))
        for (i, j), twist in zip(zip(*self.pairs, strict=True), beta[1 + 2 * d :], strict=True):
            # Products that would make a saddle of the bowl are cut down.
            most = 0.9 * np.sqrt(H[i, i] * H[j, j]) / max(d - 1, 1)
            H[i, j] = H[j, i] = np.clip(twist, -most, most)
        return H

    def report(self, centre: Array) -> Bowl:
        beta, covariance, gain = self.solve(centre)
        d = len(centre)
        weights = gain[0]
        slope_gain = gain[1 : 1 + d]
        inside = bool(np.all((centre > self.low) & (centre < self.high)))
        slope_noise = (slope_gain * self.noise**2) @ slope_gain.T
        bias = 0.0
        if inside and d:
            bias = 0.5 * float(np.trace(np.linalg.solve(self.hessian(beta, d), slope_noise)))
        sampling = float((weights**2 * self.noise**2).sum())
        total = float(covariance[0, 0])
        return Bowl(
            least=float(beta[0]) + bias,
            place=centre,
            weights=weights,
            error=float(np.sqrt(total)),
            model_error=float(np.sqrt(max(total - sampling, 0.0))),
            inside=inside,
        )


def residuals(*, places: Array, values: Array, noise: float, centre: Array) -> tuple[float, float]:
    """Return what the points near the minimum leave over about the quadratic.

    Args:
        places: shape (points, dimensions).
        values: shape (points,), log steps.
        noise: their standard error so far.
        centre: shape (dimensions,), the minimum.

    Returns:
        The weighted sum of squares and its degrees of freedom (weights less their trace).
    """
    fit = _Fit(places, values, np.full(len(values), noise), np.zeros(len(values), dtype=bool))
    beta, _, gain = fit.solve(centre)
    z = places - centre
    share = noise**2 / (noise**2 + (DEPARTURE * np.linalg.norm(z, axis=1) ** 3) ** 2)
    X = fit.features(z)
    left = np.square(values - X @ beta)
    used = np.einsum("ij,ji->i", X, gain)
    return float(share @ left), max(float(share @ (1 - used)), 0.0)
