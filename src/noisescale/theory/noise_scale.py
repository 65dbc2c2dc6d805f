"""Unbiased |G|^2 and tr(Sigma) from squared gradient norms at two or more sizes.

G is the gradient of the mean loss, Sigma the covariance of per-example gradients. Nothing
here is clamped: an unbiased estimate of |G|^2 may be negative.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError

Array = npt.NDArray[np.float64]


def unbiased_moments(
    *,
    units: npt.ArrayLike,
    examples: npt.ArrayLike,
    weighted_sq: npt.ArrayLike,
    mean_sq: npt.ArrayLike,
    population_size: int | None = None,
) -> tuple[Array, Array]:
    """Estimate |G|^2 and tr(Sigma) from one batch that was seen in several units.

    A batch of B examples is made of k units (examples, micro-batches or ranks) with sizes b_i
    and mean gradients m_i; its mean gradient is m = sum_i b_i m_i / B. Then::

        S  = (sum_i b_i |m_i|^2 - B |m|^2) / (k - 1)
        G2 = |m|^2 - S / B

    For units that were drawn without replacement from a population of N examples the gradient
    meant is the population's own::

        G2 = |m|^2 - (S / B) (1 - B / N),     tr(Sigma_N) = S (N - 1) / N

    where Sigma_N divides by N. All arguments broadcast; each may be an array over steps.

    Args:
        units: k, at least 2.
        examples: B, the sum of the units' sizes; the sizes may be unequal.
        weighted_sq: sum_i b_i |m_i|^2. With one example per unit, the sum of squared norms.
        mean_sq: |m|^2.
        population_size: N for a finite population; None for an infinite one.

    Returns:
        (|G|^2, tr(Sigma)), both unbiased, in squared gradient units (per example).

    Raises:
        InvalidInputError: fewer than two units, or more examples than the population has.

    Source: McCandlish et al. 2018, App. A.1, for two sizes; unequal sizes are the one-way
    analysis of variance with known sizes; finite population: Cochran, Sampling Techniques,
    theorem 2.2.

    >>> g2, s = unbiased_moments(units=2, examples=2, weighted_sq=10.0, mean_sq=4.0)
    >>> float(g2), float(s)
    (3.0, 2.0)
    """
    k = np.asarray(units, dtype=np.float64)
    size = np.asarray(examples, dtype=np.float64)
    mean = np.asarray(mean_sq, dtype=np.float64)
    if np.any(k < 2):
        raise InvalidInputError(
            f"units {np.min(k):g}",
            "at least two gradients per batch are required to tell noise from signal",
            "split the batch into micro-batches or use per-example norms",
        )
    trace = (np.asarray(weighted_sq, dtype=np.float64) - size * mean) / (k - 1)
    if population_size is None:
        return mean - trace / size, trace
    if np.any(size > population_size):
        raise InvalidInputError(
            f"{np.max(size):g} examples",
            f"at most the population's {population_size} can be drawn without replacement",
            "draw fewer or pass the right population_size",
        )
    left = 1 - size / population_size
    return mean - trace / size * left, trace * (1 - 1 / population_size)


def two_size_moments(
    *,
    small_size: npt.ArrayLike,
    small_sq: npt.ArrayLike,
    big_size: npt.ArrayLike,
    big_sq: npt.ArrayLike,
) -> tuple[Array, Array]:
    """Estimate |G|^2 and tr(Sigma) from squared norms at a small and a big batch size.

    G2 = (Bbig |g_big|^2 - Bsmall |g_small|^2) / (Bbig - Bsmall),
    S = (|g_small|^2 - |g_big|^2) / (1/Bsmall - 1/Bbig).

    Args:
        small_size: Bsmall, examples.
        small_sq: |g_small|^2, or its mean over several small batches.
        big_size: Bbig, examples, larger than ``small_size``.
        big_sq: |g_big|^2 at the same weights.

    Returns:
        (|G|^2, tr(Sigma)).

    Raises:
        InvalidInputError: the sizes are not in order.

    Source: McCandlish et al. 2018, App. A.1.

    >>> [float(x) for x in two_size_moments(small_size=1, small_sq=5.0, big_size=2, big_sq=4.0)]
    [3.0, 2.0]
    """
    small, big = np.asarray(small_size, np.float64), np.asarray(big_size, np.float64)
    if np.any(small <= 0) or np.any(big <= small):
        raise InvalidInputError(
            f"sizes {small_size!r} and {big_size!r}",
            "0 < small_size < big_size is required",
            "pass the two sizes in this order",
        )
    small_norm, big_norm = np.asarray(small_sq, np.float64), np.asarray(big_sq, np.float64)
    grad_sq = (big * big_norm - small * small_norm) / (big - small)
    return grad_sq, (small_norm - big_norm) / (1 / small - 1 / big)


def many_size_moments(
    *, sizes: npt.ArrayLike, squared_norms: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> tuple[float, float]:
    """Estimate |G|^2 and tr(Sigma) from squared norms at any set of two or more sizes.

    E|g_b|^2 = |G|^2 + tr(Sigma)/b is a straight line in 1/b: weighted least squares, which is
    unbiased for every choice of weights.

    Args:
        sizes: shape (n,), examples behind each gradient; at least two distinct values.
        squared_norms: shape (n,), |g|^2 of each mean gradient, all at the same weights.
        weights: shape (n,), how far each norm is trusted; default: its size.

    Returns:
        (|G|^2, tr(Sigma)).

    Raises:
        InvalidInputError: fewer than two distinct sizes, or a size that is not positive.

    Source: McCandlish et al. 2018, eq. 2.10 read as a regression.

    >>> g2, s = many_size_moments(sizes=[1, 2, 4], squared_norms=[5.0, 4.0, 3.5])
    >>> round(g2, 12), round(s, 12)
    (3.0, 2.0)
    """
    b = np.asarray(sizes, np.float64)
    y = np.asarray(squared_norms, np.float64)
    if b.ndim != 1 or b.shape != y.shape or np.any(b <= 0) or len(np.unique(b)) < 2:
        raise InvalidInputError(
            f"sizes {sizes!r}",
            "two or more distinct positive sizes, one per squared norm, are required",
            "measure at a second size",
        )
    w = b if weights is None else np.asarray(weights, np.float64)
    design = np.stack([np.ones_like(b), 1 / b], axis=1)
    root = np.sqrt(w)
    solution = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0]
    return float(solution[0]), float(solution[1])


def biased_plug_in(*, b_simple: float, batch_size: float) -> float:
    """What tr(Sigma)/|g_B|^2 reads on average: it saturates at the batch size.

    B_simple B / (B_simple + B), since E|g_B|^2 = |G|^2 + tr(Sigma)/B. Here to be tested
    against, and to explain numbers from elsewhere.

    Args:
        b_simple: the true noise scale, examples.
        batch_size: B, examples.

    Returns:
        The ratio of expectations, examples.

    Source: McCandlish et al. 2018, eq. 2.10.

    >>> biased_plug_in(b_simple=1000.0, batch_size=10.0)
    9.900990099009901
    """
    return b_simple * batch_size / (b_simple + batch_size)
