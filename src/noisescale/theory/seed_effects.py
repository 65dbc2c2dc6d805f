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

ROUNDS = 100
"""Most rounds of expectation-maximisation. (assumed)"""
LEAST_NOISE = 1e-4
"""Assumed least noise of log(steps): first passage is interpolated, not exact."""
MOST_NOISE = 1.0
"""Assumed most: where nearly all cells are bounds they do not tell it."""


class SeedEffects(NamedTuple):
    """The sum fitted to a table.

    Attributes:
        filled: shape (points, seeds), the table with expected values in the empty cells.
        doubt: shape (points, seeds), variance of a censored cell about its expected value; 0
            elsewhere.
        noise: standard deviation of what point and seed leave over.
    """

    filled: Array
    doubt: Array
    noise: float


def fill_in(*, logs: Array, reached: Mask, bound: Array) -> SeedEffects:
    """Fit log steps = point + seed + noise by expectation-maximisation, seeds and noise normal.

    A cell that was not run gets its expected value. So does a censored one: with mean mu and
    deviation s given the seed's other cells, mu + s h((c - mu)/s), h the hazard of the normal
    law at the bound c.

    Args:
        logs: shape (points, seeds); read where ``reached``.
        reached: shape (points, seeds), at least one in each row.
        bound: shape (points, seeds), lower bounds of log steps; NaN where there is none.

    Returns:
        The filled table, the doubt about censored cells and the noise.

    Source: Dempster, Laird and Rubin 1977, section 4.4 (variance components); Tobin 1958
    (censoring).
    """
    late = ~reached & ~np.isnan(bound)
    known = reached | late
    cut = np.where(late, bound, 0.0)
    filled = np.where(known, np.where(reached, logs, cut), 0.0)
    means = filled.sum(axis=1) / known.sum(axis=1)
    filled = np.where(known, filled, means[:, None])
    of_seed, of_cell = 0.005, 0.005
    for _ in range(ROUNDS):
        before = filled
        means = filled.mean(axis=1)
        mean, variance = _given_others(filled - means[:, None], known, of_seed, of_cell)
        mean = means[:, None] + mean
        doubt = np.zeros_like(filled)
        if late.any():
            expected, rest = _beyond(mean, np.sqrt(variance), cut)
            filled, doubt = np.where(late, expected, filled), np.where(late, rest, 0.0)
        filled = np.where(known, filled, mean)
        of_seed, of_cell = _variances(filled - means[:, None], doubt, known, of_seed, of_cell)
        if np.abs(filled - before).max() < 1e-5:
            break
    return SeedEffects(filled=filled, doubt=doubt, noise=_noise(filled, doubt, known, of_cell))


def _given_others(rest: Array, known: Mask, of_seed: float, of_cell: float) -> tuple[Array, Array]:
    """Return mean and variance of each cell given the other known cells of its seed."""
    told = np.where(known, rest, 0.0)
    others = known.sum(axis=0) - known
    shrink = of_seed / (of_cell + others * of_seed)
    return shrink * (told.sum(axis=0) - told), of_cell * (1 + shrink)


def _variances(
    rest: Array, doubt: Array, known: Mask, of_seed: float, of_cell: float
) -> tuple[float, float]:
    """One step of expectation-maximisation for both variances."""
    count = known.sum(axis=0)
    told = np.where(known, rest, 0.0)
    effect = of_seed * told.sum(axis=0) / (of_cell + count * of_seed)
    error = of_seed * of_cell / (of_cell + count * of_seed)
    left = np.square(rest - effect) + error + doubt
    most, least = MOST_NOISE**2, LEAST_NOISE**2
    return (
        float(np.clip(np.mean(np.square(effect) + error), least, most)),
        float(np.clip(left[known].mean(), least, most)),
    )


def _noise(filled: Array, doubt: Array, known: Mask, of_cell: float) -> float:
    """Return the noise with the degrees of freedom of a table of two ways, where it has any."""
    points, seeds = filled.shape
    freedom = int(known.sum()) - points - seeds + 1
    if freedom < 1:
        return float(np.sqrt(of_cell))
    rest = filled - filled.mean(axis=1, keepdims=True) - filled.mean(axis=0) + filled.mean()
    square = float((np.square(rest) + doubt)[known].sum()) / freedom
    return float(np.clip(np.sqrt(square), LEAST_NOISE, MOST_NOISE))


def _beyond(mean: Array, spread: Array, cut: Array) -> tuple[Array, Array]:
    """Return mean and variance of a normal variable given that it is above ``cut``."""
    from scipy.special import erfcx

    z = (cut - mean) / spread
    h = np.sqrt(2 / np.pi) / erfcx(z / np.sqrt(2))
    return mean + spread * h, spread**2 * np.clip(1 + z * h - h**2, 0.0, 1.0)
