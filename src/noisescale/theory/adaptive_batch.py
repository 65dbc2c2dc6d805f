"""Batch sizes that follow the gradient noise: the optimum by cost, and the norm test."""

from __future__ import annotations

import math

from noisescale.errors import InvalidInputError


def best_batch_size(*, r: float, noise_scale: float) -> float:
    """Batch size that spends steps and examples best: B = sqrt(r B_noise).

    It is the root, not the noise scale itself: where the noise scale is constant both agree for
    r = B_noise, the critical batch.

    Args:
        r: examples that one optimizer step is worth; positive. Larger values buy fewer steps with
            more examples.
        noise_scale: B_noise here in the training, in the same unit; positive.

    Returns:
        The batch size, not rounded.

    Raises:
        InvalidInputError: a value is not positive.

    Source: McCandlish et al. 2018 (arXiv:1812.06162), App. D.

    >>> best_batch_size(r=400, noise_scale=100)
    200.0
    """
    return math.sqrt(_positive("r", r) * _positive("noise_scale", noise_scale))


def norm_test_passes(
    *,
    trace_cov: float,
    mean_gradient_sq: float,
    batch_size: float,
    theta: float,
    dataset_size: int | None = None,
) -> bool:
    """Whether a batch is large enough: tr(Sigma) / B <= theta^2 |g_B|^2.

    Args:
        trace_cov: estimate of tr(Sigma), the variance of one example's gradient; not negative.
        mean_gradient_sq: |g_B|^2, the squared norm of the batch's own mean gradient. Its mean is
            |G|^2 + tr(Sigma) / B, which is why theta of 1 and above pass whatever the batch.
        batch_size: B, examples.
        theta: in (0, 1).
        dataset_size: N; given, the variance is that of draws without replacement, less by
            (N - B) / (N - 1).

    Raises:
        InvalidInputError: a value is out of its range.

    Source: Byrd, Chin, Nocedal and Wu 2012 (Math. Program. 134); Lau et al. 2024 (AdAdaGrad,
    arXiv:2402.11215).

    >>> norm_test_passes(trace_cov=100, mean_gradient_sq=4, batch_size=64, theta=0.5)
    False
    """
    finite = 1.0
    if dataset_size is not None:
        finite = max(0.0, dataset_size - batch_size) / max(1, dataset_size - 1)
    variance = trace_cov * finite / _positive("batch_size", batch_size)
    return variance <= _theta(theta) ** 2 * mean_gradient_sq


def norm_test_batch_size(*, trace_cov: float, mean_gradient_sq: float, theta: float) -> float:
    """Batch size that the norm test asks for next: tr(Sigma) / (theta^2 |g_B|^2).

    Args:
        trace_cov: estimate of tr(Sigma); not negative.
        mean_gradient_sq: |g_B|^2 of the present batch; positive.
        theta: in (0, 1).

    Returns:
        The batch size, not rounded.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: as :func:`norm_test_passes`.

    >>> norm_test_batch_size(trace_cov=100, mean_gradient_sq=4, theta=0.5)
    100.0
    """
    return trace_cov / _theta(theta) ** 2 / _positive("mean_gradient_sq", mean_gradient_sq)


def norm_test_rest(*, noise_scale: float, theta: float) -> float:
    """Least batch size that passes the norm test on average: B_simple (1 - theta^2) / theta^2.

    Args:
        noise_scale: B_simple = tr(Sigma) / |G|^2; positive.
        theta: in (0, 1).

    Raises:
        InvalidInputError: a value is out of its range.

    Source: derived from E |g_B|^2 = |G|^2 + tr(Sigma) / B.

    >>> norm_test_rest(noise_scale=100, theta=0.5)
    300.0
    """
    share = _theta(theta) ** 2
    return _positive("noise_scale", noise_scale) * (1 - share) / share


def _theta(theta: float) -> float:
    if not 0 < theta < 1:
        raise InvalidInputError(
            f"theta {theta:g}",
            "a number above 0 and below 1 is required (from 1 on every batch passes, since the"
            " batch's own gradient holds the noise)",
            "give for example 0.5",
        )
    return theta


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise InvalidInputError(
            f"{name} {value:g}", "a positive finite number is required", f"check {name}"
        )
    return value
