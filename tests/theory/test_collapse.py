from __future__ import annotations

import itertools

import numpy as np
import pytest

from noisescale.errors import InvalidInputError
from noisescale.theory.collapse import collapse, collapse_of_trials
from surfaces import Search, Surface, hyperbola, trials

SIZES = np.repeat([4.0, 16, 64], 7)
STEPS = np.tile(np.geomspace(0.125, 8, 7), 3)


def bowl(r: np.ndarray) -> np.ndarray:
    return np.log((1 / r + r) / 2)


def test_the_same_temperature_is_the_best_everywhere() -> None:
    rates = 0.1 * SIZES * STEPS
    result = collapse(batch_size=SIZES, rate=rates, metric=bowl(STEPS))
    assert result.temperature_mismatch == pytest.approx(0, abs=1e-12)
    assert result.rate_mismatch is not None
    assert result.rate_mismatch > 0.5
    assert result.collapses
    assert result.optimum_rate_exponent == pytest.approx(1)


def test_the_same_rate_is_the_best_everywhere() -> None:
    result = collapse(batch_size=SIZES, rate=STEPS, metric=bowl(STEPS))
    assert result.rate_mismatch == pytest.approx(0, abs=1e-12)
    assert result.collapses is False
    assert result.optimum_rate_exponent == pytest.approx(0)


def test_the_level_of_a_curve_does_not_count() -> None:
    rates = 0.1 * SIZES * STEPS
    level = np.log(SIZES)
    one = collapse(batch_size=SIZES, rate=rates, metric=bowl(STEPS))
    two = collapse(batch_size=SIZES, rate=rates, metric=bowl(STEPS) - level)
    three = collapse(batch_size=SIZES, rate=rates, metric=level - bowl(STEPS), optimum="greatest")
    assert two.rate_mismatch == pytest.approx(one.rate_mismatch)
    assert three.rate_mismatch == pytest.approx(one.rate_mismatch)


def test_the_mismatch_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    rates, metric = STEPS * SIZES**0.5, bowl(STEPS) + 0.1 * rng.standard_normal(21)
    result = collapse(batch_size=SIZES, rate=rates, metric=metric)
    centred, distances = metric.copy(), []
    for size in (4, 16, 64):
        centred[size == SIZES] -= metric[size == SIZES].min()
    for i in range(21):
        for size in {4, 16, 64} - {int(SIZES[i])}:
            other = np.flatnonzero(size == SIZES)
            for left, right in itertools.pairwise(other):
                if rates[left] <= rates[i] < rates[right]:
                    share = np.log(rates[i] / rates[left]) / np.log(rates[right] / rates[left])
                    at = (1 - share) * centred[left] + share * centred[right]
                    distances.append(abs(centred[i] - at))
            if np.isclose(rates[i], rates[other[-1]]):
                distances.append(abs(centred[i] - centred[other[-1]]))
    assert result.rate_mismatch == pytest.approx(np.mean(distances) / centred.std())


def test_trials_of_a_surface() -> None:
    """Far below both critical sizes the best rate is proportional to the batch size."""
    surface = Surface(law=hyperbola(critical=1e4), rate_batch=1e4, noise=0.02, stability=20)
    rng = np.random.default_rng(0)
    search = Search(rates=9, factor=1.6, race=False)
    rows = [row for size in (4, 8, 16) for row in trials(surface, search, size, rng)]
    result = collapse_of_trials(rows)
    assert result.collapses
    assert result.optimum_rate_exponent == pytest.approx(1, abs=0.35)  # half a step of the grid
    assert len(result.rows) == 27


def test_no_overlap_is_no_answer() -> None:
    result = collapse(
        batch_size=[1, 1, 1, 64, 64, 64], rate=[1, 2, 3, 100, 200, 300], metric=[0] * 6
    )
    assert result.rate_mismatch is None
    assert result.collapses is None


def test_bad_input() -> None:
    with pytest.raises(InvalidInputError, match="equal length"):
        collapse(batch_size=[1, 2], rate=[1], metric=[1, 2])
    with pytest.raises(InvalidInputError, match="finite"):
        collapse(batch_size=[1], rate=[1], metric=[np.nan])
    with pytest.raises(InvalidInputError, match="reached the target"):
        collapse_of_trials([])
