from __future__ import annotations

import math

import numpy as np
import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import Interval, Tradeoff
from noisescale.theory.comparison import compare, ratio
from noisescale.theory.tradeoff import fit_tradeoff

SIZES = [2, 8, 32, 128, 512, 2048]


def fit(steps_min: float, critical: float, *, seed: int = 0, target: str = "a<1") -> Tradeoff:
    noise = 0.05 * np.random.default_rng(seed).standard_normal(6)
    steps = [steps_min * (1 + critical / b) for b in SIZES]
    return fit_tradeoff(batch_size=SIZES, steps=np.array(steps) * np.exp(noise), target=target)


def test_ratios_of_points_and_joint_errors() -> None:
    one, two = fit(100, 64), fit(50, 128, seed=1)
    (momentum,) = compare({"sgd": one, "momentum": two})
    assert (momentum.name, momentum.against) == ("momentum", "sgd")
    got, points = momentum.steps_min, (two.steps_min.point, one.steps_min.point)
    assert got.point == pytest.approx(points[0] / points[1])
    up = math.hypot(
        math.log(two.steps_min.high / two.steps_min.point),
        math.log(one.steps_min.point / one.steps_min.low),
    )
    assert got.high == pytest.approx(got.point * math.exp(up))


def test_coverage_of_a_ratio() -> None:
    hits = 0
    for seed in range(60):
        (entry,) = compare({"b": fit(50, 128, seed=2 * seed), "a": fit(100, 64, seed=2 * seed + 1)})
        critical = entry.critical_batch
        hits += critical.low <= 0.5 <= (critical.high or math.inf)
    # Three standard errors below 95 % in 60 repeats.
    assert hits / 60 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 60)


def test_the_other_way_round_is_the_inverse() -> None:
    fits = {"sgd": fit(100, 64), "momentum": fit(50, 128, seed=1)}
    (one,), (two,) = compare(fits), compare(fits, against="momentum")
    assert one.steps_min.high == pytest.approx(1 / two.steps_min.low)


def test_open_ends_stay_open() -> None:
    closed, open_ = Interval(point=2, low=1, high=4), Interval(point=3, low=1, high=None)
    assert ratio(open_, closed).high is None
    assert ratio(closed, open_).low == 0
    assert ratio(closed, Interval(point=None, low=1, high=None)).point is None


def test_bad_input() -> None:
    one = fit(100, 64)
    with pytest.raises(InvalidInputError, match="two sweeps"):
        compare({"sgd": one})
    with pytest.raises(InvalidInputError, match="two sweeps"):
        compare({"sgd": one, "adam": one}, against="lamb")
    with pytest.raises(InvalidInputError, match="one target"):
        compare({"sgd": one, "adam": fit(100, 64, target="b<1")})
