from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import least_squares

from noisescale.errors import InvalidInputError
from noisescale.records import RateLaw
from noisescale.theory.rate_law import best_rate, fit_rate_law

SIZES = np.array([2.0**k for k in range(12)])


def rates(seed: int, noise: float, exponent: float = 1.0) -> np.ndarray:
    exact = best_rate(batch_size=SIZES, rate_max=0.5, saturation=32, exponent=exponent)
    return np.asarray(exact * np.exp(noise * np.random.default_rng(seed).standard_normal(12)))


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_exact_rates(exponent: float) -> None:
    law = fit_rate_law(batch_size=SIZES, rate=rates(0, 0.0, exponent))
    assert law.exponent.point == pytest.approx(exponent, abs=0.01)
    assert law.saturation.point == pytest.approx(32, rel=0.02)
    assert law.rate_max.point == pytest.approx(0.5, rel=0.01)
    assert RateLaw.from_json(law.to_json()) == law


def test_the_fit_is_that_of_a_general_optimiser() -> None:
    data = rates(5, 0.1)

    def rest(v: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(data) - v[0] + v[2] * np.logaddexp(0, v[1] - np.log(SIZES)))

    slow = least_squares(rest, [0, 3, 1])
    law = fit_rate_law(batch_size=SIZES, rate=data)
    assert law.exponent.point == pytest.approx(slow.x[2], abs=0.01)
    assert law.saturation.point == pytest.approx(np.exp(slow.x[1]), rel=0.03)
    assert law.rms_log_error == pytest.approx(np.sqrt(2 * slow.cost / 12), rel=1e-3)


def test_coverage() -> None:
    repeats, hits = 100, np.zeros(3)
    for seed in range(repeats):
        law = fit_rate_law(batch_size=SIZES, rate=rates(seed, 0.1))
        found = law.exponent, law.saturation, law.rate_max
        for i, (interval, truth) in enumerate(zip(found, (1.0, 32.0, 0.5), strict=True)):
            above = interval.low is None or interval.low <= truth
            hits[i] += above and (interval.high is None or truth <= interval.high)
    assert (hits / repeats > 0.95 - 0.066).all()  # three standard errors


def test_no_saturation_shows() -> None:
    law = fit_rate_law(batch_size=SIZES[:6], rate=0.01 * SIZES[:6] ** 0.5)
    assert law.saturation.high is None
    assert law.saturation.point is None
    assert law.rate_max.high is None
    assert law.exponent.point == pytest.approx(0.5, abs=0.02)
    assert "still grows" in law.detail


def test_a_constant_rate() -> None:
    noise = np.exp(0.05 * np.random.default_rng(0).standard_normal(12))
    law = fit_rate_law(batch_size=SIZES, rate=0.1 * noise)
    assert law.saturation.point is None
    assert law.saturation.low == 0


def test_edges_are_left_out() -> None:
    data = rates(0, 0.0)
    data[[0, 3]] *= 5
    edge = np.zeros(12, dtype=bool)
    edge[[0, 3]] = True
    law = fit_rate_law(batch_size=SIZES, rate=data, on_edge=edge.tolist())
    assert law.left_out == (1, 8)
    assert law.exponent.point == pytest.approx(1.0, abs=0.01)


def test_too_few() -> None:
    law = fit_rate_law(batch_size=SIZES, rate=SIZES, on_edge=[True] * 9 + [False] * 3)
    assert law.exponent.point is None
    assert "at least 4 are needed" in law.detail


def test_bad_edges() -> None:
    with pytest.raises(InvalidInputError, match="on_edge"):
        fit_rate_law(batch_size=SIZES, rate=SIZES, on_edge=[True])
