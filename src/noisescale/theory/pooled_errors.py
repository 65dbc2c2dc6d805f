"""Variances of few seeds each, pooled over batch sizes as far as they agree."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def moderated(*, variances: npt.ArrayLike, freedom: npt.ArrayLike) -> tuple[Array, Array]:
    """Shrink sample variances towards their common value, as much as they agree.

    The true variances are taken as s0^2 d0 / chi^2(d0); s0 and d0 are fitted to the logarithms
    of the sample variances, and each becomes (d0 s0^2 + d s^2)/(d0 + d) with d0 + d degrees of
    freedom. Sample variances that scatter no more than chance share one value, with all their
    degrees of freedom together.

    Args:
        variances: shape (n,), sample variances; positive.
        freedom: shape (n,), their degrees of freedom; at least 1.

    Returns:
        The moderated variances and their degrees of freedom, shape (n,) each.

    Source: Smyth 2004 (Linear models and empirical Bayes methods), section 6.2.

    >>> s, d = moderated(variances=[1.0, 1.0, 1.0], freedom=[2, 2, 2])
    >>> s.round(6).tolist(), d.tolist()
    ([1.0, 1.0, 1.0], [6.0, 6.0, 6.0])
    """
    from scipy.special import digamma, polygamma

    s = np.asarray(variances, dtype=np.float64)
    d = np.asarray(freedom, dtype=np.float64)
    if len(s) < 2:
        return s, d
    e = np.log(s) - digamma(d / 2) + np.log(d / 2)
    between = float(e.var(ddof=1) - polygamma(1, d / 2).mean())
    if between <= 0:
        pooled = float((d * s).sum() / d.sum())
        return np.full(len(s), pooled), np.full(len(s), float(d.sum()))
    half = _inverse_trigamma(between)
    # The pool cannot be told better than by all the seeds that made it.
    d0 = min(2 * half, float(d.sum()))
    s0 = math.exp(float(e.mean()) + float(digamma(half)) - math.log(half))
    return (d0 * s0 + d * s) / (d0 + d), np.minimum(d0 + d, d.sum())


def _inverse_trigamma(y: float) -> float:
    """Solve trigamma(x) = y by Newton's method on 1/trigamma (Smyth 2004, appendix)."""
    from scipy.special import polygamma

    x = 0.5 + 1 / y
    for _ in range(50):
        tri = float(polygamma(1, x))
        step = tri * (1 - tri / y) / float(polygamma(2, x))
        x += step
        if abs(step) < 1e-9 * x:
            break
    return x


def common_variance(deviations: npt.ArrayLike) -> float:
    """Variance over seeds of what a seed has in common at all batch sizes.

    The mean, over pairs of batch sizes, of their covariance over seeds; 0 where it is not above
    the standard error that independent batch sizes would give it, the mean variance times
    sqrt(1/((seeds - 1) pairs)): few seeds would else widen everything by chance.

    Args:
        deviations: shape (seeds, batch sizes), log steps of each seed less the mean over seeds;
            NaN where a seed did not run.

    Returns:
        The variance; 0 where fewer than two seeds or two batch sizes can be compared.
    """
    table = np.asarray(deviations, dtype=np.float64)
    total, chance, pairs = 0.0, 0.0, 0
    for i in range(table.shape[1]):
        for j in range(i):
            both = ~np.isnan(table[:, i]) & ~np.isnan(table[:, j])
            if both.sum() >= 2:
                square = np.cov(table[both, i], table[both, j])
                total += float(square[0, 1])
                chance += float(square[0, 0] * square[1, 1]) / (int(both.sum()) - 1)
                pairs += 1
    if not pairs or total <= np.sqrt(chance):
        return 0.0
    return total / pairs
