from __future__ import annotations

import math

import numpy as np
import pytest

from noisescale.errors import InvalidInputError
from noisescale.records import Interval
from noisescale.theory.branching import critical_by_branches, paired_excess, verdict


def around(*points, half=0.002):
    return [Interval(point=p, low=p - half, high=p + half) for p in points]


SIZES = [8, 16, 32, 64]


def test_all_smaller_ones_must_keep_the_loss_as_well():
    # 64 keeps it again, by luck or by design: it does not count
    found = critical_by_branches(
        batch_sizes=SIZES, excess=around(0.0, 0.001, 0.05, 0.001), tolerance=0.01
    )
    assert (found.low, found.point, found.high) == (16.0, math.sqrt(16 * 32), 32.0)


def test_where_nothing_is_lost_it_is_a_lower_bound():
    found = critical_by_branches(
        batch_sizes=SIZES, excess=around(0.0, 0.0, 0.001, 0.002), tolerance=0.01
    )
    assert found == Interval(point=None, low=64.0, high=None)


def test_noise_widens_the_interval():
    noisy = around(0.0, 0.001, 0.012, 0.1, half=0.02)
    noisy[0] = Interval(point=0.0, low=0.0, high=0.0)
    found = critical_by_branches(batch_sizes=SIZES, excess=noisy, tolerance=0.01)
    assert (found.low, found.point, found.high) == (8.0, math.sqrt(16 * 32), 64.0)


def test_a_diverged_branch_bounds_it():
    lost = [*around(0.0, 0.0), Interval(point=math.inf, low=math.inf, high=None)]
    found = critical_by_branches(batch_sizes=SIZES[:3], excess=lost, tolerance=0.01)
    assert (found.low, found.high) == (16.0, 32.0)


def test_pairs_take_out_what_seeds_have_in_common():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 1.0, 6)
    reference = (1 + shared).tolist()
    losses = (1.05 + shared + rng.normal(0, 0.001, 6)).tolist()
    found = paired_excess(losses=losses, reference=reference)
    assert found.low < 0.05 < found.high
    assert found.high - found.low < 0.01


def test_the_interval_covers():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        gaps = 0.02 + 0.01 * rng.standard_normal(4)
        found = paired_excess(losses=gaps.tolist(), reference=[0.0] * 4)
        inside += found.low <= 0.02 <= found.high
    # exact Student: 0.95 within four binomial deviations
    assert abs(inside / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_verdicts():
    assert verdict(low=0.0, high=0.02, tolerance=0.01) == "unclear"
    assert verdict(low=0.011, high=None, tolerance=0.01) == "beyond"
    assert verdict(low=None, high=None, tolerance=0.01) == "unclear"
    assert paired_excess(losses=[1.0], reference=[0.5]).low is None


@pytest.mark.parametrize(
    "given",
    [
        {"batch_sizes": [8, 8], "excess": around(0.0, 0.0), "tolerance": 0.01},
        {"batch_sizes": [8], "excess": around(0.0, 0.0), "tolerance": 0.01},
        {"batch_sizes": [8], "excess": around(0.0), "tolerance": 0.0},
        {"batch_sizes": [], "excess": [], "tolerance": 0.01},
    ],
)
def test_bad_input(given):
    with pytest.raises(InvalidInputError):
        critical_by_branches(**given)
    with pytest.raises(InvalidInputError):
        paired_excess(losses=[], reference=[])
