from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from noisescale.errors import InvalidInputError
from noisescale.records import Regimes
from noisescale.theory.regimes import fit_regimes
from surfaces import three_pieces

SIZES = np.array([2.0**k for k in range(12)])
LAW = three_pieces(plateau=100, perfect_end=16, useful_end=256)


def steps(seed: int, noise: float, sizes: np.ndarray = SIZES) -> np.ndarray:
    exact = np.array([LAW(size) for size in sizes])
    return np.asarray(
        exact * np.exp(noise * np.random.default_rng(seed).standard_normal(len(sizes)))
    )


def test_exact_pieces() -> None:
    fit = fit_regimes(batch_size=SIZES, steps=steps(0, 0.0))
    assert fit.perfect_end.point == pytest.approx(16, rel=0.01)
    assert fit.useful_end.point == pytest.approx(256, rel=0.01)
    assert fit.plateau.point == pytest.approx(100, rel=0.01)
    assert fit.examples.point == pytest.approx(LAW(1), rel=0.01)
    assert fit.middle_slope == pytest.approx(-0.5, abs=0.01)
    assert fit.small_slope.point == pytest.approx(-1, abs=1e-6)
    assert fit.detail == "all three regimes were seen"
    assert Regimes.from_json(fit.to_json()) == fit


def test_the_fit_is_that_of_a_general_optimiser() -> None:
    sizes, counts = SIZES, steps(3, 0.1)
    x, y = np.log(sizes), np.log(counts)

    def rest(v: np.ndarray) -> float:
        start, gap, c, fall = v[0], abs(v[1]), v[2], v[3]
        fall = min(max(fall, 0.0), gap)
        share = np.clip((x - start) / max(gap, 1e-9), 0, 1)
        return float(np.square(y - np.where(x < start, c - x, c - start - share * fall)).sum())

    best = min(
        minimize(
            rest,
            [start, gap, 8.0, gap / 2],
            method="Nelder-Mead",
            options={"maxiter": 4000, "xatol": 1e-7, "fatol": 1e-10},
        ).fun
        for start in (1.5, 2.5, 3.5)
        for gap in (1.5, 3.0)
    )
    fit = fit_regimes(batch_size=sizes, steps=counts)
    assert fit.rms_log_error == pytest.approx(np.sqrt(best / 12), rel=2e-3)


@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_coverage(noise: float) -> None:
    truth = {"perfect_end": 16, "useful_end": 256, "plateau": 100, "examples": LAW(1)}
    repeats, hits = 60, dict.fromkeys(truth, 0)
    for seed in range(repeats):
        fit = fit_regimes(batch_size=SIZES, steps=steps(seed, noise))
        for name, value in truth.items():
            interval = getattr(fit, name)
            hits[name] += interval.low <= value and (interval.high or np.inf) >= value
    for count in hits.values():
        assert count / repeats > 0.95 - 0.084  # three standard errors


def test_all_three_are_said_to_be_seen_only_where_their_ends_are_known() -> None:
    sizes = np.array([4.0, 8, 16, 32, 64, 128, 256])
    counts = np.array([367, 202, 127, 90.4, 59.7, 54.5, 47.5])
    fit = fit_regimes(batch_size=sizes, steps=counts)
    assert fit.perfect_end.point is None
    assert fit.detail == (
        "the best fit shows three regimes, the intervals leave their ends open: "
        "add smaller and larger sizes or more seeds"
    )


def test_a_plateau_not_seen_is_open() -> None:
    sizes = SIZES[:7]
    fit = fit_regimes(batch_size=sizes, steps=steps(0, 0.02, sizes))
    assert fit.useful_end.high is None
    assert fit.useful_end.point is None
    assert fit.plateau.point is None
    assert fit.plateau.low == 0


def test_perfect_scaling_not_seen_is_open() -> None:
    sizes = SIZES[5:]
    fit = fit_regimes(batch_size=sizes, steps=steps(0, 0.02, sizes))
    assert fit.perfect_end.low == 0
    assert fit.examples.point is None
    assert fit.small_slope.point is None


def test_weights() -> None:
    counts = steps(0, 0.0)
    counts[0] *= 1.5
    errors = np.array([1.0, *([0.01] * 11)])
    fit = fit_regimes(batch_size=SIZES, steps=counts, log_error=errors)
    assert fit.perfect_end.point == pytest.approx(16, rel=0.05)


def test_too_few_sizes() -> None:
    fit = fit_regimes(batch_size=SIZES[:4], steps=steps(0, 0.0, SIZES[:4]))
    assert fit.plateau.point is None
    assert "at least 5 are needed" in fit.detail


def test_bad_errors() -> None:
    with pytest.raises(InvalidInputError, match="log_error"):
        fit_regimes(batch_size=SIZES, steps=SIZES, log_error=[1.0])
