"""The pooled estimator at held weights: exactness, coverage, the census."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import Outcome
from noisescale.theory.frozen import MIN_GROUPS, estimate_frozen, frozen_set
from noisescale.theory.noise_scale import unbiased_moments
from problems import quadratic_draws

REPEATS = 1500
SLACK = 3.3 * (0.95 * 0.05 / REPEATS) ** 0.5


def pooled(groups: np.ndarray, population_size: int | None = None):
    """From per-example gradients of shape (K, n, d)."""
    means = groups.mean(1)
    return estimate_frozen(
        gram=means @ means.T,
        group_examples=np.full(len(groups), groups.shape[1]),
        group_units=np.full(len(groups), groups.shape[1]),
        group_weighted_sq=(groups**2).sum((1, 2)),
        population_size=population_size,
    )


def test_groups_are_one_big_batch() -> None:
    gradients = np.random.default_rng(0).standard_normal((12, 4, 6)) + 0.5
    found = pooled(gradients)
    flat = gradients.reshape(-1, 6)
    trace = flat.var(0, ddof=1).sum()
    assert found.trace_cov == pytest.approx(trace)
    assert found.grad_sq == pytest.approx((flat.mean(0) ** 2).sum() - trace / 48)
    assert found.low < found.b_simple < found.high


def test_a_full_pass_is_a_census() -> None:
    gradients = np.random.default_rng(1).standard_normal((10, 3, 4)) + 1
    found = pooled(gradients, population_size=30)
    flat = gradients.reshape(-1, 4)
    exact = flat.var(0).sum() / (flat.mean(0) ** 2).sum()
    assert found.outcome is Outcome.DETERMINED
    assert found.low == pytest.approx(exact)
    assert found.b_simple == pytest.approx(exact)
    assert found.high == pytest.approx(exact)


def test_a_full_pass_by_micro_batches_is_none() -> None:
    """|G|^2 is exact, tr(Sigma) depends on the cut: the set covers over random cuts."""
    rng = np.random.default_rng(4)
    population = rng.standard_normal((480, 4)) + 0.5
    exact = population.var(0).sum() / (population.mean(0) ** 2).sum()
    covered = 0
    for _ in range(400):
        micro = population[rng.permutation(480)].reshape(20, 6, 4, 4).mean(2)
        means = micro.mean(1)
        found = estimate_frozen(
            gram=means @ means.T,
            group_examples=np.full(20, 24),
            group_units=np.full(20, 6),
            group_weighted_sq=4 * (micro**2).sum((1, 2)),
            population_size=480,
        )
        assert found.low < found.high
        covered += found.low <= exact <= found.high
    # Binomial: 0.95 +- 3.3 standard errors, and the bounds of 93 to 97 %.
    assert 0.93 - 0.036 <= covered / 400 <= 0.97 + 0.036


def test_finite_population_by_enumeration() -> None:
    population = np.random.default_rng(2).standard_normal((6, 2)) + 0.3
    every = [
        unbiased_moments(
            units=4,
            examples=4,
            weighted_sq=(population[list(draw)] ** 2).sum(),
            mean_sq=(population[list(draw)].mean(0) ** 2).sum(),
            population_size=6,
        )
        for draw in combinations(range(6), 4)
    ]
    assert np.mean(every, axis=0) == pytest.approx(
        [(population.mean(0) ** 2).sum(), population.var(0).sum()]
    )


@pytest.mark.parametrize("kind", ["isotropic", "power law"])
@pytest.mark.parametrize("noise_scale", [10.0, 100.0, 1000.0])
def test_coverage(kind: str, noise_scale: float) -> None:
    draws = quadratic_draws(
        np.random.default_rng(9),
        repeats=REPEATS,
        steps=20,
        batch_size=32,
        units=32,
        kind=kind,
        noise_scale=noise_scale,
    )
    gram = draws.mean @ draws.mean.transpose(0, 2, 1)
    traces = (draws.weighted_sq - 32 * draws.mean_sq) / 31
    g, s = unbiased_moments(
        units=640, examples=640, weighted_sq=draws.weighted_sq.sum(1), mean_sq=gram.mean((1, 2))
    )
    low, high = frozen_set(gram=gram, group_trace=traces, grad_sq=g, trace_cov=s, level=0.95)
    covered = ((low <= 1 / noise_scale) & (1 / noise_scale <= high)).mean()
    assert 0.93 - SLACK <= covered <= 0.97 + SLACK
    assert abs(g.mean() - 1) < 4 * g.std() / REPEATS**0.5


def test_pooling_narrows_the_interval_where_noise_dominates() -> None:
    from noisescale.theory.interval import moving_set

    draws = quadratic_draws(
        np.random.default_rng(9),
        repeats=200,
        steps=20,
        batch_size=8,
        units=8,
        kind="isotropic",
        noise_scale=100.0,
    )
    gram = draws.mean @ draws.mean.transpose(0, 2, 1)
    g, s = unbiased_moments(
        units=8, examples=8, weighted_sq=draws.weighted_sq, mean_sq=draws.mean_sq
    )
    pooled_g, pooled_s = unbiased_moments(
        units=160, examples=160, weighted_sq=draws.weighted_sq.sum(1), mean_sq=gram.mean((1, 2))
    )
    low, _ = frozen_set(gram=gram, group_trace=s, grad_sq=pooled_g, trace_cov=pooled_s, level=0.95)
    step_low, _ = moving_set(grad_sq=g, trace_cov=s, examples=np.ones(20), level=0.95)
    assert (low > 0).mean() > 0.9 > 0.5 > (step_low > 0).mean()


def test_outcomes_and_border() -> None:
    noise = np.random.default_rng(3).standard_normal((20, 8, 50))
    assert pooled(noise).outcome in (Outcome.LOWER_BOUND, Outcome.TOO_FEW_STEPS)
    assert pooled(noise[: MIN_GROUPS - 1]).outcome is Outcome.TOO_FEW_STEPS
    assert pooled(noise * np.nan).outcome is Outcome.NOT_FINITE
    with pytest.raises(InvalidInputError, match="equal length"):
        estimate_frozen(
            gram=np.eye(3), group_examples=[1, 1], group_units=[2, 2], group_weighted_sq=[1, 1]
        )
