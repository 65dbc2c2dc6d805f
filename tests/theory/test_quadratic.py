"""The noisy quadratic against simulation of itself by separate, slower means."""

from __future__ import annotations

import numpy as np
import pytest

from noisescale.errors import InvalidInputError
from noisescale.theory.quadratic import NoisyQuadratic

WORLD = NoisyQuadratic(np.array([0.5, 1.0, 2.0]), np.array([1.0, 3.0, 0.5]))
WEIGHTS = np.array([1.0, -0.5, 0.25])


def test_scales_from_their_definitions() -> None:
    gradient = np.diag(WORLD.curvature) @ WEIGHTS
    sigma, hessian = np.diag(WORLD.noise), np.diag(WORLD.curvature)
    assert WORLD.b_simple(WEIGHTS) == pytest.approx(np.trace(sigma) / (gradient @ gradient))
    assert WORLD.b_noise(WEIGHTS) == pytest.approx(
        np.trace(hessian @ sigma) / (gradient @ hessian @ gradient)
    )


def test_expected_change_is_least_at_the_best_rate() -> None:
    best = float(WORLD.best_lr(WEIGHTS, batch_size=4))
    rates = best * np.linspace(0.5, 1.5, 101)
    changes = [float(WORLD.expected_loss_change(WEIGHTS, lr=r, batch_size=4)) for r in rates]
    assert rates[int(np.argmin(changes))] == pytest.approx(best)


def test_expected_change_by_simulation() -> None:
    rng = np.random.default_rng(0)
    start = np.broadcast_to(WEIGHTS, (100_000, 3))
    path, _ = WORLD.sgd(rng, start, lr=0.3, batch_size=4, steps=2)
    change = WORLD.loss(path[:, 1]) - WORLD.loss(path[:, 0])
    expected = float(WORLD.expected_loss_change(WEIGHTS, lr=0.3, batch_size=4))
    assert change.mean() == pytest.approx(expected, abs=4 * change.std() / 100_000**0.5)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_stationary_variance_by_simulation(momentum: float) -> None:
    rng = np.random.default_rng(1)
    path, _ = WORLD.sgd(
        rng, np.zeros((4000, 3)), lr=0.4, batch_size=2, steps=120, momentum=momentum
    )
    expected = WORLD.stationary_variance(lr=0.4, batch_size=2, momentum=momentum)
    # 4,000 independent runs: standard error of a variance is sqrt(2/4000) = 2.2 %.
    assert path[:, -1].var(0) == pytest.approx(expected, rel=0.09)


def test_an_unstable_rate_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="is stable"):
        WORLD.stationary_variance(lr=1.0, batch_size=2)
    with pytest.raises(InvalidInputError, match="positive curvatures"):
        NoisyQuadratic(np.array([0.0]), np.array([1.0]))
