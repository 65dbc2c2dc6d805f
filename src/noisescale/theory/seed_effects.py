"""Log steps of points by seeds as a sum: point + seed + noise, cells missing or censored.

Trials that share a seed share initial weights and data order, and so are slow or quick together:
differences between points are less noisy than the points, and missing cells can be filled in.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

ROUNDS = 200
LEAST_NOISE = 1e-4
"""Assumed least noise of log(steps): first passage is interpolated, not exact."""


class SeedEffects(NamedTuple):
    """The sum fitted to a table.

    Attributes:
        filled: shape (points, seeds), the table with expected values in the empty cells.
        noise: standard deviation of what point and seed leave over.
    """

    filled: Array
    noise: float


def fill_in(*, logs: Array, reached: Mask, bound: Array) -> SeedEffects:
    """Fit log steps = point + seed + normal noise by expectation-maximisation.

    A cell that was not run gets its fitted value; a censored one the mean of a normal variable
    beyond its bound, mu + sigma h((c - mu)/sigma), h the hazard of the normal law.

    Args:
        logs: shape (points, seeds); read where ``reached``.
        reached: shape (points, seeds), at least one in each row.
        bound: shape (points, seeds), lower bounds of log steps; NaN where there is none.

    Returns:
        The filled table and the noise.

    Source: Dempster, Laird and Rubin 1977 (EM); Tobin 1958 (censoring).
    """
    known = reached | ~np.isnan(bound)
    cut = np.where(reached, np.nan, bound)
    late = ~np.isnan(cut)
    filled = np.where(reached, logs, cut)
    means = np.nanmean(np.where(known, filled, np.nan), axis=1)
    filled = np.where(known, filled, means[:, None])
    noise, extra = 0.1, np.zeros_like(filled)
    for _ in range(ROUNDS):
        before = filled
        fitted = _sum(filled)
        if late.any():
            expected, variance = _beyond(fitted, noise, np.where(late, cut, 0.0))
            filled = np.where(late, expected, filled)
            extra = np.where(late, variance, 0.0)
        filled = np.where(known, filled, fitted)
        noise = _noise(filled - _sum(filled), extra, known)
        if np.abs(filled - before).max() < 1e-7:
            break
    return SeedEffects(filled=filled, noise=noise)


def _sum(table: Array) -> Array:
    """Return the least-squares sum of a row and a column effect for a full table."""
    fitted: Array = table.mean(axis=1, keepdims=True) + table.mean(axis=0) - table.mean()
    return fitted


def _noise(rest: Array, extra: Array, known: Mask) -> float:
    points, seeds = rest.shape
    freedom = max(int(known.sum()) - points - seeds + 1, 1)
    square = float((np.square(rest) + extra)[known].sum()) / freedom
    return max(float(np.sqrt(square)), LEAST_NOISE)


def _beyond(mean: Array, noise: float, cut: Array) -> tuple[Array, Array]:
    """Return mean and variance of a normal variable given that it is above ``cut``."""
    from scipy.special import erfcx

    z = (cut - mean) / noise
    h = np.sqrt(2 / np.pi) / erfcx(z / np.sqrt(2))
    return mean + noise * h, noise**2 * np.maximum(1 + z * h - h**2, 0.0)
