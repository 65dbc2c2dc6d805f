"""Adaptive batch sizes: the optimum by search, the norm test by its definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisescale.errors import InvalidInputError
from noisescale.theory.adaptive_batch import (
    best_batch_size,
    norm_test_batch_size,
    norm_test_passes,
    norm_test_rest,
)

positive = st.floats(1e-3, 1e6)


@settings(deadline=None)
@given(r=positive, noise=st.lists(positive, min_size=1, max_size=6))
def test_the_root_is_the_cheapest(r: float, noise: list[float]) -> None:
    """Per unit of progress S ~ 1 + Bn/B steps and E = B S examples: minimise E + r S piece by
    piece, over a noise scale that changes along the training."""

    def cost(sizes: list[float]) -> float:
        steps = [1 + n / b for n, b in zip(noise, sizes, strict=True)]
        return sum(b * s + r * s for b, s in zip(sizes, steps, strict=True))

    best = [best_batch_size(r=r, noise_scale=n) for n in noise]
    for index, factor in ((0, 0.9), (0, 1.1), (-1, 0.97), (-1, 1.03)):
        other = list(best)
        other[index] *= factor
        assert cost(best) <= cost(other) * (1 + 1e-12)


@settings(deadline=None)
@given(trace=positive, grad_sq=positive, batch=positive, theta=st.floats(0.01, 0.99))
def test_the_norm_test_is_a_least_batch_size_on_average(
    trace: float, grad_sq: float, batch: float, theta: float
) -> None:
    mean = grad_sq + trace / batch
    rest = norm_test_rest(noise_scale=trace / grad_sq, theta=theta)
    if not math.isclose(batch, rest, rel_tol=1e-9):
        passes = norm_test_passes(
            trace_cov=trace, mean_gradient_sq=mean, batch_size=batch, theta=theta
        )
        assert passes is (batch > rest)
        asked = norm_test_batch_size(trace_cov=trace, mean_gradient_sq=mean, theta=theta)
        assert (asked <= batch) is passes


def test_growing_by_the_norm_test_ends_at_its_rest() -> None:
    trace, grad_sq, theta, batch = 300.0, 2.0, 0.4, 4.0
    for _ in range(60):
        asked = norm_test_batch_size(
            trace_cov=trace, mean_gradient_sq=grad_sq + trace / batch, theta=theta
        )
        batch = max(batch, asked)
    assert batch == pytest.approx(norm_test_rest(noise_scale=150.0, theta=theta), rel=1e-6)


def test_the_whole_data_set_has_no_noise() -> None:
    full = {"trace_cov": 1e9, "mean_gradient_sq": 1e-9, "theta": 0.1, "dataset_size": 500}
    assert norm_test_passes(batch_size=500, **full)  # type: ignore[arg-type]
    assert norm_test_passes(batch_size=501, **full)  # type: ignore[arg-type]
    assert not norm_test_passes(batch_size=499, **full)  # type: ignore[arg-type]
    half = {"trace_cov": 100.0, "mean_gradient_sq": 4.0, "theta": 0.5, "batch_size": 51}
    assert not norm_test_passes(**half)  # type: ignore[arg-type]
    assert norm_test_passes(**half, dataset_size=101)  # type: ignore[arg-type]


@pytest.mark.parametrize("theta", [1.0, 1.5, 0.0, -0.1, math.nan, math.inf])
def test_a_theta_that_every_batch_passes_is_refused(theta: float) -> None:
    with pytest.raises(InvalidInputError, match="below 1 is required"):
        norm_test_rest(noise_scale=1.0, theta=theta)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_values_that_are_not_positive_are_refused(value: float) -> None:
    for call in (
        lambda: best_batch_size(r=value, noise_scale=1.0),
        lambda: best_batch_size(r=1.0, noise_scale=value),
        lambda: norm_test_batch_size(trace_cov=1.0, mean_gradient_sq=value, theta=0.5),
        lambda: norm_test_rest(noise_scale=value, theta=0.5),
    ):
        with pytest.raises(InvalidInputError, match="positive finite"):
            call()
