"""Rows of unequal noise in the fit of the steps law."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_ndtr

from noisescale.errors import InvalidInputError
from noisescale.records import Interval
from noisescale.theory.steps_likelihood import StepsLikelihood
from noisescale.theory.tradeoff import fit_tradeoff

SIZES = np.array([2.0, 8, 32, 128, 512, 2048])


def curve(seed: int, noise: np.ndarray) -> np.ndarray:
    steps = 300 * (1 + 100 / SIZES)
    return np.asarray(steps * np.exp(noise * np.random.default_rng(seed).standard_normal(6)))


def slow_cost(b: float, late: np.ndarray, steps: np.ndarray, errors: np.ndarray) -> float:
    """-2 log likelihood at b, minimised over a and the noise by a general optimiser."""
    r = np.log(steps) - np.log1p(np.exp(b) / SIZES)

    def cost(x: np.ndarray) -> float:
        z = (r - x[0]) / (np.exp(x[1]) * errors)
        ours = np.square(z[~late]).sum() + 2 * (~late).sum() * x[1]
        return float(ours - 2 * log_ndtr(-z[late]).sum())

    start = [np.average(r[~late], weights=errors[~late] ** -2), 1.0]
    once = minimize(cost, start, method="Nelder-Mead")
    return float(minimize(cost, once.x, method="Nelder-Mead", tol=1e-10).fun)


@pytest.mark.parametrize("censored", [0, 1])
def test_the_likelihood_is_that_of_a_general_optimiser(censored: int) -> None:
    errors = np.array([0.3, 0.05, 0.1, 0.05, 0.2, 0.05])
    steps, late = curve(0, errors), np.arange(6) < censored
    likelihood = StepsLikelihood.of(
        log_sizes=np.log(SIZES), log_steps=np.log(steps), censored=late, log_error=errors
    )
    grid = np.log([20.0, 60.0, 100.0, 200.0])
    slow = np.array([slow_cost(b, late, steps, errors) for b in grid])
    fast = likelihood.cost(grid)
    # Both are known up to a constant.
    np.testing.assert_allclose(fast - fast[0], slow - slow[0], atol=1e-5)


def test_only_ratios_of_errors_count() -> None:
    errors = np.array([0.3, 0.05, 0.1, 0.05, 0.2, 0.05])
    steps = curve(1, errors)
    one = fit_tradeoff(batch_size=SIZES, steps=steps, log_error=errors)
    ten = fit_tradeoff(batch_size=SIZES, steps=steps, log_error=10 * errors)
    assert one.critical_batch.point == pytest.approx(ten.critical_batch.point, rel=1e-6)
    equal = fit_tradeoff(batch_size=SIZES, steps=steps, log_error=np.full(6, 0.7))
    plain = fit_tradeoff(batch_size=SIZES, steps=steps)
    assert equal.critical_batch.high == pytest.approx(plain.critical_batch.high, rel=1e-6)


def test_a_noisy_row_hardly_moves_the_fit() -> None:
    steps = curve(2, np.zeros(6))
    steps[0] *= 2
    errors = np.array([1.0, *([0.01] * 5)])
    fit = fit_tradeoff(batch_size=SIZES, steps=steps, log_error=errors)
    assert fit.critical_batch.point == pytest.approx(100, rel=0.01)


def width(interval: Interval) -> float:
    assert interval.low is not None
    assert interval.high is not None
    return float(np.log(interval.high / interval.low))


def test_weights_narrow_the_intervals_of_unequal_rows() -> None:
    errors = np.array([0.3, 0.02, 0.3, 0.02, 0.3, 0.02])
    fits = [
        (
            fit_tradeoff(batch_size=SIZES, steps=steps, log_error=errors),
            fit_tradeoff(batch_size=SIZES, steps=steps),
        )
        for steps in (curve(seed, errors) for seed in range(20))
    ]
    ratios = [width(a.steps_min) / width(b.steps_min) for a, b in fits if b.steps_min.point]
    assert np.median(ratios) < 0.6


@pytest.mark.parametrize("wrong", [[0.1] * 5, [0.0] + [0.1] * 5, [np.nan] + [0.1] * 5])
def test_bad_errors(wrong: list[float]) -> None:
    with pytest.raises(InvalidInputError, match="log_error"):
        fit_tradeoff(batch_size=SIZES, steps=curve(0, np.zeros(6)), log_error=wrong)
