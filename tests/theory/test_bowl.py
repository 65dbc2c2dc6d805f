from __future__ import annotations

import math

import numpy as np
import pytest

from noisescale.theory.bowl import CURVATURE, lowest, residuals


def places(count: int, gap: float, shift: float = 0.0) -> np.ndarray:
    return ((np.arange(count) - (count - 1) / 2) * gap + shift)[:, None]


def bowl(x: np.ndarray) -> np.ndarray:
    """Log of (1/r + r)/2 in x = log r."""
    return np.log(np.cosh(x))[:, 0]


@pytest.mark.parametrize("shift", [-0.3, 0.0, 0.2])
def test_exact_points_of_a_quadratic(shift: float) -> None:
    x = places(5, 0.4, shift)
    found = lowest(places=x, values=1 + 0.6 * x[:, 0] ** 2, noise=np.full(5, 1e-4))
    assert found.place[0] == pytest.approx(0, abs=1e-2)
    assert found.least == pytest.approx(1, abs=2e-3)
    assert found.inside


def test_two_dimensions_with_a_ridge() -> None:
    side = np.linspace(-1, 1, 5)
    x = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2) + 0.2
    values = 2 + 0.6 * x[:, 0] ** 2 + 0.5 * x[:, 1] ** 2 + 0.5 * x[:, 0] * x[:, 1]
    found = lowest(places=x, values=values, noise=np.full(25, 1e-3))
    np.testing.assert_allclose(found.place, 0, atol=0.05)
    assert found.least == pytest.approx(2, abs=5e-3)


def test_the_weights_are_the_derivative_of_the_fit() -> None:
    rng = np.random.default_rng(0)
    x, noise = places(7, 0.35, 0.1), np.full(7, 0.05)
    values = bowl(x) + 0.05 * rng.standard_normal(7)
    found = lowest(places=x, values=values, noise=noise)
    for i in range(7):
        up, down = values.copy(), values.copy()
        up[i] += 1e-3
        down[i] -= 1e-3
        slope = (
            lowest(places=x, values=up, noise=noise).least
            - lowest(places=x, values=down, noise=noise).least
        ) / 2e-3
        # The minimum moves the weights and the added terms a little: hence the tolerance.
        assert found.weights[i] == pytest.approx(slope, abs=0.05)
    assert found.weights.sum() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("gap", [0.25, 0.5])
def test_no_curse_of_the_winner(gap: float) -> None:
    """The smallest of noisy points is far too low; the smallest of the bowl is not."""
    rng, noise, repeats = np.random.default_rng(1), 0.08, 300
    least, error, naive = [], [], []
    for _ in range(repeats):
        x = places(9, gap, gap * rng.uniform(-0.5, 0.5))
        values = bowl(x) + noise * rng.standard_normal(9)
        found = lowest(places=x, values=values, noise=np.full(9, noise), gap=np.array([gap]))
        least.append(found.least)
        error.append(found.error)
        naive.append(values.min())
    assert np.mean(naive) < -0.01
    assert abs(np.mean(least)) < 0.012
    # The error is stated as large as it is: a standard deviation of 300 is known to 4 %.
    assert np.std(least) == pytest.approx(np.mean(error), rel=0.25)


def test_a_bound_that_the_curve_breaks_bends_it() -> None:
    x = places(3, 0.7)
    values, noise = np.array([1.5, 0.0, 1.5]), np.full(3, 0.02)
    late = np.array([True, False, True])
    gap, edge = np.array([0.7]), np.array([0.35])
    bent = lowest(places=x, values=values, noise=noise, bounded=late, low=-edge, high=edge, gap=gap)
    free = lowest(
        places=x, values=values * 0.1, noise=noise, bounded=late, low=-edge, high=edge, gap=gap
    )
    # A bound below the curve says nothing: as if the point were not there.
    alone = lowest(
        places=x[1:2], values=values[1:2], noise=noise[1:2], low=-edge, high=edge, gap=gap
    )
    assert free.least == pytest.approx(alone.least)
    assert bent.least != pytest.approx(free.least, abs=1e-4)


def test_a_single_point_is_as_high_as_the_grid_is_coarse() -> None:
    """Uniform within half a gap of the minimum: on average a h^2/12 above it."""
    gap = 0.6
    found = lowest(
        places=np.zeros((1, 1)), values=np.array([1.0]), noise=np.array([1e-3]), gap=np.array([gap])
    )
    assert found.least == pytest.approx(1 - CURVATURE * gap**2 / 12, abs=2e-3)


def test_nothing_searched_is_a_mean() -> None:
    found = lowest(places=np.zeros((1, 0)), values=np.array([1.0]), noise=np.array([0.1]))
    assert found.least == 1.0
    assert found.error == pytest.approx(0.1)


def test_residuals_tell_the_noise() -> None:
    rng, noise = np.random.default_rng(2), 0.1
    squares = freedom = 0.0
    for _ in range(100):
        x = places(15, 0.1)
        values = bowl(x) + noise * rng.standard_normal(15)
        s, f = residuals(places=x, values=values, noise=noise, centre=np.zeros(1))
        squares, freedom = squares + s, freedom + f
    # About 1,200 degrees of freedom: known to 2 % in the deviation.
    assert math.sqrt(squares / freedom) == pytest.approx(noise, rel=0.07)
