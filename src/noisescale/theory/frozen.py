"""The noise scale at weights held still: all steps form one big batch.

Pooling keeps the products between steps, which step-by-step estimates throw away: where noise
dominates, the interval narrows like 1/n instead of 1/sqrt(n).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError
from noisescale.records import Outcome
from noisescale.theory.interval import Array, RatioEstimate, from_set, without_noise
from noisescale.theory.noise_scale import unbiased_moments

MIN_GROUPS = 10
"""Fewer groups of draws give no interval (their covariance cannot be estimated)."""

_DEGENERATE_SHARE = 3.0
"""Part of 4 tr(Sigma^2)/K^2 that is taken off the jackknife variance of the linear part.
4 is unbiased; 3 covers for the noise of taking it off. Measured: benchmarks/coverage.py."""


def estimate_frozen(
    *,
    gram: npt.ArrayLike,
    group_examples: npt.ArrayLike,
    group_units: npt.ArrayLike,
    group_weighted_sq: npt.ArrayLike,
    mean_sq: float | None = None,
    population_size: int | None = None,
    level: float = 0.95,
) -> RatioEstimate:
    """Estimate the noise scale from K groups of draws at the same weights.

    Args:
        gram: shape (K, K), inner products of the groups' mean gradients (exact or from an
            unbiased sketch).
        group_examples: shape (K,), examples in each group, about equal.
        group_units: shape (K,), units (examples or micro-batches) in each group, at least 2.
        group_weighted_sq: shape (K,), sum over the group's units of b_i |m_i|^2.
        mean_sq: exact |mean gradient over everything|^2; None takes it from ``gram``.
        population_size: N when the draws were made without replacement from N examples and
            the gradient meant is the population's.
        level: confidence level.

    Returns:
        The pooled unbiased estimate with its set. A full pass by examples is a census with
        ``low == high == b_simple``; by micro-batches tr(Sigma) is still an estimate.

    Raises:
        InvalidInputError: the shapes do not fit, or more examples than the population has.

    Source: the U-statistic of |G|^2 with its Hoeffding decomposition (van der Vaart 1998,
    ch. 12) at the hypothesis tested; finite population factors from Cochran, ch. 2.
    """
    matrix = np.asarray(gram, np.float64)
    sizes, units, weighted = (
        np.asarray(values, np.float64)
        for values in (group_examples, group_units, group_weighted_sq)
    )
    if matrix.shape != (len(sizes), len(sizes)) or not len(sizes) == len(units) == len(weighted):
        raise InvalidInputError(
            f"a Gram matrix of shape {matrix.shape} for {len(sizes)} groups",
            "one row, size, unit count and sum of squares per group is required",
            "pass arrays of equal length",
        )
    total = sizes.sum()
    share = sizes / total
    pooled = float(share @ matrix @ share) if mean_sq is None else mean_sq
    grad_sq, trace_cov = unbiased_moments(
        units=units.sum(),
        examples=total,
        weighted_sq=weighted.sum(),
        mean_sq=pooled,
        population_size=population_size,
    )
    g, s = float(grad_sq), float(trace_cov)
    if not (np.isfinite(g) and np.isfinite(s)):
        return from_set(g, s, 0, 0, level)
    if s <= 0:
        return without_noise(g, level)
    by_examples = units.sum() >= total
    whole = population_size is not None and total >= population_size
    if whole and by_examples and g > 0:
        return RatioEstimate(
            outcome=Outcome.DETERMINED,
            b_simple=s / g,
            low=s / g,
            high=s / g,
            level=level,
            grad_sq=g,
            trace_cov=s,
            detail="a census: every example of the population was measured",
        )
    if len(sizes) < MIN_GROUPS:
        return RatioEstimate(
            outcome=Outcome.TOO_FEW_STEPS,
            b_simple=None,
            low=None,
            high=None,
            level=level,
            grad_sq=g,
            trace_cov=s,
            detail=f"{len(sizes)} draws; an interval needs at least {MIN_GROUPS}",
        )
    traces = (weighted - sizes * np.diag(matrix)) / (units - 1)
    left = 1.0 if population_size is None else 1 - total / population_size
    low, high = frozen_set(
        gram=matrix[None],
        group_trace=traces[None],
        grad_sq=np.array([g]),
        trace_cov=np.array([s]),
        level=level,
        left=left,
        trace_left=left if by_examples else 1.0,
    )
    return from_set(g, s, float(low[0]), float(high[0]), level)


@dataclass(frozen=True)
class _Spread:
    """Variance parts of the pooled |G|^2 - phi tr(Sigma)."""

    linear: Array
    degenerate: Array
    largest: Array
    trace: Array
    correlation: Array

    def variance(self, phi: Array, grad_sq: Array, trace_cov: Array) -> Array:
        """Evaluate at the hypothesis |G|^2 = phi tr(Sigma), not at the estimate.

        The linear part is 4 G'Sigma G/n: proportional to |G|^2 at a given direction, and at
        most that of the noisiest direction.
        """
        slope = np.where(grad_sq > 0, self.linear / np.maximum(grad_sq, 1e-300), self.largest)
        linear = np.minimum(slope, self.largest) * np.maximum(phi, 0) * trace_cov
        cross = 2 * phi * self.correlation * np.sqrt(linear * self.trace)
        return linear + phi**2 * self.trace - cross + self.degenerate


def frozen_set(
    *,
    gram: Array,
    group_trace: Array,
    grad_sq: Array,
    trace_cov: Array,
    level: float,
    left: float = 1.0,
    trace_left: float = 1.0,
) -> tuple[Array, Array]:
    """Compute the set for phi = |G|^2 / tr(Sigma) of many pooled measurements at once.

    Args:
        gram: shape (R, K, K).
        group_trace: shape (R, K), unbiased tr(Sigma) of each group.
        grad_sq: shape (R,), pooled unbiased |G|^2.
        trace_cov: shape (R,), pooled unbiased tr(Sigma).
        level: confidence level.
        left: 1 - n/N, the share of a finite population not drawn.
        trace_left: the same for tr(Sigma): 1 with units larger than one example, whose
            trace depends on how a full pass was cut as well.

    Returns:
        (low, high) of phi, each of shape (R,); low may be negative.

    Source: see :func:`estimate_frozen`.
    """
    from scipy.special import stdtrit

    groups = gram.shape[-1]
    spread = _spread(gram, group_trace, left, trace_left)
    quantile = float(stdtrit(groups - 1, (1 + level) / 2))

    def accepted(phi: Array) -> npt.NDArray[np.bool_]:
        error = np.sqrt(np.maximum(spread.variance(phi, grad_sq, trace_cov), 1e-300))
        return np.asarray(np.abs(grad_sq - phi * trace_cov) <= quantile * error)

    point = np.maximum(grad_sq / trace_cov, 0)
    widest = np.sqrt(spread.degenerate + spread.linear + point**2 * spread.trace)
    reach = quantile * widest / trace_cov + point * 1e-12 + 1e-300
    high = _edge(accepted, point, reach, sign=1.0)
    low = _edge(accepted, point, np.minimum(reach, np.maximum(point, 1e-300)), sign=-1.0)
    nothing = ~accepted(point)
    # Where even phi = 0 is rejected from below, no positive phi is compatible.
    return np.where(nothing, -np.inf, low), np.where(nothing, -np.inf, high)


def _edge(accepted: object, point: Array, reach: Array, *, sign: float) -> Array:
    assert callable(accepted)
    inside, outside, step = point.copy(), point + sign * reach, reach.copy()
    for _ in range(60):
        still = accepted(outside) & (outside > 0)
        if not still.any():
            break
        inside = np.where(still, outside, inside)
        step = np.where(still, 2 * step, step)
        outside = np.where(still, outside + sign * step, outside)
    if sign < 0:
        outside = np.maximum(outside, 0)
        whole = accepted(outside)
        inside = np.where(whole, outside, inside)
    for _ in range(60):
        middle = (inside + outside) / 2
        good = accepted(middle)
        inside, outside = np.where(good, middle, inside), np.where(good, outside, middle)
    return inside


def _spread(gram: Array, group_trace: Array, left: float, trace_left: float) -> _Spread:
    groups = gram.shape[-1]
    centred = (
        gram
        - gram.mean(-1, keepdims=True)
        - gram.mean(-2, keepdims=True)
        + gram.mean((-1, -2), keepdims=True)
    )
    trace = np.trace(centred, axis1=-2, axis2=-1)
    # Unbiased tr(S^2) of a Gaussian sample covariance S (Srivastava 2005), up to (K-1)^2.
    nu = groups - 1
    square = ((centred**2).sum((-1, -2)) - trace**2 / nu) / ((nu - 1) * (nu + 2))
    square = np.maximum(square, 0) / groups**2
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    products = (gram.sum(-1) - diagonal) / (groups - 1)
    linear = 4 * products.var(-1, ddof=1) / groups - _DEGENERATE_SHARE * square
    linear = np.maximum(linear, 0) * left
    of_trace = group_trace.var(-1, ddof=1) / groups * trace_left
    d_products = products - products.mean(-1, keepdims=True)
    d_trace = group_trace - group_trace.mean(-1, keepdims=True)
    covariance = 2 * (d_products * d_trace).sum(-1) / nu / groups * np.sqrt(left * trace_left)
    scale = np.sqrt(np.maximum(linear * of_trace, 1e-300))
    return _Spread(
        linear=linear,
        degenerate=2 * square * left**2,
        largest=4 * np.sqrt(square) * left,
        trace=of_trace,
        correlation=np.clip(covariance / scale, -0.95, 0.95),
    )
