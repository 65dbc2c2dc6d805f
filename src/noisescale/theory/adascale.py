"""AdaScale: by how much a larger batch makes one step count for more."""

from __future__ import annotations

from noisescale.errors import InvalidInputError

LARGEST_MEMORY = 1000
"""Examples, in base batches, over which the estimates are averaged. (paper: app. B.3)"""


def gain(*, trace_cov: float, grad_sq: float, base_batch_size: float, batch_size: float) -> float:
    """Gain of one step at a larger batch over one at the base batch.

    r = (s + m) / (s / S + m) with s = tr(Sigma) / b, m = |G|^2, S = batch_size / b. A step of r
    times the rate then lowers the expected loss of an isotropic quadratic as r base steps from
    the same weights do, to second order in the rate. It is the noise-aware factor
    (1 + Bn/b) / (1 + Bn/(S b)) with Bn = tr(Sigma) / |G|^2.

    Args:
        trace_cov: tr(Sigma) of one example's gradient; at least 0.
        grad_sq: |G|^2; at least 0, and one of the two positive.
        base_batch_size: b, at which the rate was tuned; positive.
        batch_size: of this step, positive. Below b, where the paper has no statement, the same
            formula lowers the rate.

    Returns:
        r, between 1 (no noise) and S (only noise).

    Raises:
        InvalidInputError: a value is out of its range.

    Source: Johnson et al. 2020 (arXiv:2007.05105), algorithm 1.

    >>> gain(trace_cov=320.0, grad_sq=10.0, base_batch_size=32, batch_size=128)
    1.6
    """
    for name, value in (("base_batch_size", base_batch_size), ("batch_size", batch_size)):
        if not 0 < value < float("inf"):
            raise InvalidInputError(f"{name} {value:g}", "a positive number is required", "change")
    largest = max(trace_cov, grad_sq)
    if not (trace_cov >= 0 and grad_sq >= 0 and 0 < largest < float("inf")):
        raise InvalidInputError(
            f"trace_cov {trace_cov:g} with grad_sq {grad_sq:g}",
            "finite numbers of at least 0, one of them positive, are required",
            "average more estimates first",
        )
    noise, signal = trace_cov / largest, grad_sq / largest
    found = (noise / base_batch_size + signal) / (noise / batch_size + signal)
    scale = batch_size / base_batch_size
    return min(max(found, min(1.0, scale)), max(1.0, scale))  # only rounding passes the ends


def smoothing(*, scale: float) -> float:
    """Weight of the past in AdaScale's averages: max(1 - S/1000, 0).

    The first 1/(1 - theta) estimates enter a plain average.

    Args:
        scale: S, batch size over base batch size; positive.

    Returns:
        theta, in [0, 1).

    Source: Johnson et al. 2020 (arXiv:2007.05105), app. B.3.

    >>> smoothing(scale=50), smoothing(scale=4000)
    (0.95, 0.0)
    """
    return max(1 - scale / LARGEST_MEMORY, 0.0)
