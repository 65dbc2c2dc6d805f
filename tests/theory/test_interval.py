"""Sets for the noise scale at moving weights: coverage, outcomes, closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from noisescale.errors import InvalidInputError
from noisescale.records import Outcome
from noisescale.theory.interval import MIN_STEPS, estimate_moving, moving_set
from noisescale.theory.noise_scale import unbiased_moments
from problems import quadratic_draws, regression_draws

REPEATS = 1500
# Binomial 99.9 % half-width of a coverage of 0.95 over this many repeats, beyond 93-97 %.
SLACK = 3.3 * (0.95 * 0.05 / REPEATS) ** 0.5


def series(
    kind: str, noise_scale: float, units: int = 8, steps: int = 40
) -> tuple[np.ndarray, ...]:
    draws = quadratic_draws(
        np.random.default_rng(11),
        repeats=REPEATS,
        steps=40,
        batch_size=8,
        units=units,
        kind=kind,
        noise_scale=noise_scale,
    )
    return unbiased_moments(
        units=units, examples=8, weighted_sq=draws.weighted_sq, mean_sq=draws.mean_sq
    )


@pytest.mark.parametrize("kind", ["isotropic", "power law", "rank 1"])
@pytest.mark.parametrize("noise_scale", [10.0, 1000.0])
@pytest.mark.parametrize("units", [8, 2])
def test_coverage(kind: str, noise_scale: float, units: int) -> None:
    g, s = series(kind, noise_scale, units)
    low, high = moving_set(grad_sq=g, trace_cov=s, examples=np.ones(40), level=0.95)
    covered = ((low <= 1 / noise_scale) & (1 / noise_scale <= high)).mean()
    assert 0.93 - SLACK <= covered <= 0.97 + SLACK
    error = g.mean(1).std() / REPEATS**0.5
    assert abs(g.mean() - 1) < 4 * error
    assert s.mean() == pytest.approx(noise_scale, rel=0.05)


def test_coverage_of_products_of_gaussians() -> None:
    drawn = regression_draws(
        np.random.default_rng(3),
        repeats=REPEATS,
        steps=40,
        batch_size=8,
        units=(8,),
        kind="power law",
        noise_scales=(100.0,),
    )[100.0, 8]
    g, s = unbiased_moments(
        units=8, examples=8, weighted_sq=drawn.weighted_sq, mean_sq=drawn.mean_sq
    )
    low, high = moving_set(grad_sq=g, trace_cov=s, examples=np.ones(40), level=0.95)
    assert 0.93 - SLACK <= ((low <= 0.01) & (high >= 0.01)).mean() <= 0.97 + SLACK


def test_without_skewness_the_set_is_fiellers() -> None:
    """Mirrored series have no skewness: the ends solve Fieller's quadratic in closed form."""
    rng = np.random.default_rng(5)
    half = rng.standard_normal((2, 20)) * np.array([[0.3], [2.0]])
    g = 1.0 + np.concatenate([half[0], -half[0]])
    s = 50.0 + np.concatenate([half[1], -half[1]])
    order = rng.permutation(40)
    g, s = g[order], s[order]
    found = estimate_moving(grad_sq=g, trace_cov=s, examples=np.ones(40))
    q2 = stats.t.ppf(0.975, 39) ** 2 / 40
    cov = np.cov(g, s)
    roots = np.roots(
        [
            s.mean() ** 2 - q2 * cov[1, 1],
            -2 * (g.mean() * s.mean() - q2 * cov[0, 1]),
            g.mean() ** 2 - q2 * cov[0, 0],
        ]
    )
    # Hall's transform keeps a cubic term without skewness only through skewness itself, which
    # is zero at phi of the mean but not at the ends when g and s differ; here both mirror.
    assert found.low == pytest.approx(1 / max(roots), rel=1e-6)
    assert found.high == pytest.approx(1 / min(roots), rel=1e-6)
    assert found.b_simple == pytest.approx(s.mean() / g.mean())


def test_the_set_widens_to_the_skewed_side() -> None:
    """A chi-square series: the upper end of phi lies beyond Student's."""
    rng = np.random.default_rng(2)
    g = rng.chisquare(1, 20)
    s = np.full(20, 10.0)
    _, high = moving_set(grad_sq=g[None], trace_cov=s[None], examples=np.ones(20), level=0.95)
    student = (g.mean() + stats.t.ppf(0.975, 19) * g.std(ddof=1) / 20**0.5) / 10
    assert high[0] > 1.1 * student


def test_drift_does_not_widen_the_interval() -> None:
    """The estimand is the window's mean of true values: their drift is no error."""
    rng = np.random.default_rng(4)
    drift = np.linspace(10, 0.5, 400)
    error = rng.standard_normal(400)
    s = np.full(400, 100.0)
    drifting = estimate_moving(grad_sq=drift + error, trace_cov=s, examples=np.ones(400))
    level = estimate_moving(grad_sq=drift.mean() + error, trace_cov=s, examples=np.ones(400))
    assert drifting.high - drifting.low < 1.15 * (level.high - level.low)


def test_steps_are_weighted_by_examples() -> None:
    rng = np.random.default_rng(6)
    sizes = np.tile([8, 56], 20)
    g, s = 1 + rng.standard_normal(40) / sizes, 10 + rng.standard_normal(40) / sizes
    found = estimate_moving(grad_sq=g, trace_cov=s, examples=sizes)
    assert found.grad_sq == pytest.approx(np.average(g, weights=sizes))
    assert found.b_simple == pytest.approx(
        np.average(s, weights=sizes) / np.average(g, weights=sizes)
    )


@pytest.mark.parametrize(
    ("mean", "outcome"),
    [
        (5.0, Outcome.DETERMINED),
        (0.1, Outcome.LOWER_BOUND),
        (-5.0, Outcome.TOO_FEW_STEPS),
    ],
)
def test_outcomes(mean: float, outcome: Outcome) -> None:
    noise = np.random.default_rng(1).standard_normal(50)
    found = estimate_moving(
        grad_sq=mean + noise - noise.mean(), trace_cov=np.full(50, 30.0), examples=np.ones(50)
    )
    assert found.outcome is outcome
    assert found.grad_sq == pytest.approx(mean)  # never clamped
    if outcome is Outcome.LOWER_BOUND:
        assert found.low > 0
        assert found.high is None
        assert found.b_simple is None


def test_too_few_steps_and_none_at_all() -> None:
    few = estimate_moving(
        grad_sq=[1.0] * (MIN_STEPS - 1), trace_cov=[2.0] * (MIN_STEPS - 1), examples=1
    )
    assert few.outcome is Outcome.TOO_FEW_STEPS
    assert few.b_simple is None
    none = estimate_moving(grad_sq=[], trace_cov=[], examples=[])
    assert none.outcome is Outcome.TOO_FEW_STEPS


def test_no_noise_at_all() -> None:
    found = estimate_moving(grad_sq=np.ones(20), trace_cov=np.full(20, 7.0), examples=np.ones(20))
    assert found.outcome is Outcome.DETERMINED
    assert found.low == pytest.approx(7, rel=1e-6)
    assert found.high == pytest.approx(7, rel=1e-6)


def test_border() -> None:
    with pytest.raises(InvalidInputError, match="equal length"):
        estimate_moving(grad_sq=[1.0, 2.0], trace_cov=[1.0], examples=1)
    with pytest.raises(InvalidInputError, match=r"pass 0\.95"):
        estimate_moving(grad_sq=[1.0], trace_cov=[1.0], examples=1, level=95)


def test_no_gradient_and_no_noise() -> None:
    nothing = estimate_moving(grad_sq=np.zeros(20), trace_cov=np.zeros(20), examples=np.ones(20))
    assert nothing.outcome is Outcome.UNSUPPORTED
    assert "exactly zero" in nothing.detail
    equal = estimate_moving(grad_sq=np.ones(20), trace_cov=np.zeros(20), examples=np.ones(20))
    assert (equal.outcome, equal.low, equal.high) == (Outcome.DETERMINED, 0.0, 0.0)
