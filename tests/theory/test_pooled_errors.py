from __future__ import annotations

import numpy as np
import pytest
from scipy.special import polygamma

from noisescale.theory.pooled_errors import _inverse_trigamma, common_variance, moderated


def test_variances_that_agree_share_one() -> None:
    s, d = moderated(variances=[1.0, 1.1, 0.9, 1.0], freedom=[4, 4, 4, 4])
    np.testing.assert_allclose(s, 1.0, rtol=1e-9)
    np.testing.assert_allclose(d, 16)


def test_variances_that_differ_stay_apart() -> None:
    s, d = moderated(variances=[0.01, 1.0, 100.0], freedom=[50, 50, 50])
    np.testing.assert_allclose(s, [0.01, 1.0, 100.0], rtol=0.1)
    assert (d < 60).all()


def test_moderated_variances_are_nearer_to_the_truth() -> None:
    """True variances by the model's own law, d0 = 8: mean squared log errors."""
    rng = np.random.default_rng(0)
    raw, better = [], []
    for _ in range(100):
        truth = 8 / rng.chisquare(8, 12)
        sample = truth * rng.chisquare(2, 12) / 2
        s, d = moderated(variances=sample, freedom=np.full(12, 2))
        assert (d >= 2).all()
        raw.append(np.mean(np.log(sample / truth) ** 2))
        better.append(np.mean(np.log(s / truth) ** 2))
    assert np.mean(better) < 0.4 * np.mean(raw)


def test_one_alone() -> None:
    s, d = moderated(variances=[2.0], freedom=[3])
    assert (s[0], d[0]) == (2.0, 3.0)


@pytest.mark.parametrize("y", [1e-3, 0.1, 1.0, 30.0])
def test_inverse_trigamma(y: float) -> None:
    assert float(polygamma(1, _inverse_trigamma(y))) == pytest.approx(y, rel=1e-8)


def test_common_variance() -> None:
    rng = np.random.default_rng(1)
    shared = 0.3 * rng.standard_normal(4000)
    table = shared[:, None] + 0.5 * rng.standard_normal((4000, 5))
    assert common_variance(table) == pytest.approx(0.09, rel=0.1)
    own = 0.5 * rng.standard_normal((4000, 5))
    assert common_variance(own) < 0.01
    table[::2, 0] = np.nan
    assert common_variance(table) == pytest.approx(0.09, rel=0.1)
    assert common_variance(np.full((3, 3), np.nan)) == 0


def test_chance_of_few_seeds_is_no_common_variance() -> None:
    """One standard error is passed by chance in about one of six repeats."""
    rng = np.random.default_rng(2)
    found = [common_variance(rng.standard_normal((3, 10))) > 0 for _ in range(200)]
    # Three standard errors of a share of 16 % in 200 repeats: 8 %.
    assert 0.05 < np.mean(found) < 0.24
    shared = [
        common_variance(rng.standard_normal((3, 1)) + 0.5 * rng.standard_normal((3, 10))) > 0
        for _ in range(100)
    ]
    assert np.mean(shared) > 0.8
