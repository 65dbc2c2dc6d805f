from __future__ import annotations

import numpy as np
import pytest

from noisescale.theory.seed_effects import _beyond, fill_in

NAN = np.nan


def simulate(seed: int, points: int, seeds: int, shared: float, own: float):
    rng = np.random.default_rng(seed)
    means = np.linspace(0, 0.5, points)[:, None]
    return means + shared * rng.standard_normal(seeds) + own * rng.standard_normal((points, seeds))


def test_a_full_table_stays_as_it_is() -> None:
    logs = simulate(0, 4, 6, 0.1, 0.05)
    cells = fill_in(logs=logs, reached=np.ones((4, 6), bool), bound=np.full((4, 6), NAN))
    np.testing.assert_array_equal(cells.filled, logs)
    rest = logs - logs.mean(axis=1, keepdims=True) - logs.mean(axis=0) + logs.mean()
    assert cells.noise == pytest.approx(np.sqrt((rest**2).sum() / (3 * 5)))
    assert not cells.doubt.any()


def test_a_missing_cell_follows_its_seed() -> None:
    logs = simulate(1, 4, 8, 0.3, 0.01)
    reached = np.ones((4, 8), bool)
    reached[2, 5] = False
    cells = fill_in(logs=np.where(reached, logs, NAN), reached=reached, bound=np.full((4, 8), NAN))
    assert cells.filled[2, 5] == pytest.approx(logs[2, 5], abs=0.05)


def test_filled_cells_are_not_biased_by_slow_seeds() -> None:
    """Six of eight seeds ran two points only: means over all seeds are compared fairly."""
    missed = []
    for seed in range(60):
        logs = simulate(seed, 4, 8, 0.2, 0.05)
        reached = np.ones((4, 8), bool)
        reached[:2, 2:] = False
        bound = np.full((4, 8), NAN)
        cells = fill_in(logs=np.where(reached, logs, NAN), reached=reached, bound=bound)
        missed.append(cells.filled.mean(axis=1)[0] - logs.mean(axis=1)[0])
    assert np.std(missed) < 0.06  # two seeds alone would leave 0.2 sqrt(1/2 - 1/8) = 0.12
    assert abs(np.mean(missed)) < 3 * np.std(missed) / np.sqrt(60)


@pytest.mark.parametrize("points", [1, 3])
def test_censored_cells_leave_the_means_unbiased(points: int) -> None:
    errors = []
    for seed in range(100):
        logs = simulate(seed, points, 8, 0.1, 0.1)
        logs -= logs.mean() * 0
        cut = np.full(logs.shape, 0.05 + np.linspace(0, 0.5, points)[:, None])
        reached = logs <= cut
        if not reached.any(axis=1).all():
            continue
        bound = np.where(reached, NAN, cut)
        cells = fill_in(logs=np.where(reached, logs, NAN), reached=reached, bound=bound)
        errors.append(cells.filled.mean() - np.linspace(0, 0.5, points).mean())
        assert (cells.filled[~reached] > cut[~reached]).all()
        assert (cells.doubt[~reached] > 0).all()
    # The truncated mean alone would lie 0.07 below.
    assert abs(np.mean(errors)) < 3 * np.std(errors) / 10 + 0.012


def test_mostly_bounds_do_not_run_away() -> None:
    logs = np.array([[6.717, 6.753, NAN, 6.801, NAN]])
    bound = np.array([[NAN, NAN, 6.801, NAN, 6.801]])
    cells = fill_in(logs=logs, reached=~np.isnan(logs), bound=bound)
    assert cells.filled.max() < 7
    assert cells.noise < 0.2


def test_a_normal_variable_beyond_a_bound() -> None:
    rng = np.random.default_rng(0)
    draws = 0.3 + 0.2 * rng.standard_normal(400_000)
    for cut in (0.0, 0.4, 0.7):
        mean, variance = _beyond(np.array(0.3), np.array(0.2), np.array(cut))
        above = draws[draws > cut]
        assert float(mean) == pytest.approx(above.mean(), abs=4 * above.std() / len(above) ** 0.5)
        assert float(variance) == pytest.approx(above.var(), rel=0.05)
