"""Averages over steps: how fast they forget, how much noise they keep."""

from __future__ import annotations

import math

from noisescale.errors import InvalidInputError
from noisescale.theory.ranges import fraction, positive

BELOW_ONE = math.nextafter(1.0, 0.0)
"""Where float64 holds nothing nearer to 1. (paper: IEEE 754)"""


def forgetting(*, decay: float, batch_size: float) -> float:
    """Logarithm of what an average keeps, per example: -ln(decay)/B.

    ln 2 over the half-life, and -ln(1 - mu) of the decay mu per example, in the one form that
    keeps its digits near decays of 0 and of 1.

    Args:
        decay: what is kept per step, in [0, 1).
        batch_size: B, examples per step; positive.

    Returns:
        Per example; infinite where nothing is kept.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: definition.

    >>> round(forgetting(decay=0.25, batch_size=2) / math.log(2), 12)
    1.0
    """
    positive("batch_size", batch_size)
    kept = fraction("decay", decay)
    return -math.log(kept) / batch_size if kept else math.inf


def decay_of_forgetting(*, rate: float, batch_size: float) -> float:
    """What is kept per step: exp(-rate B), the inverse of :func:`forgetting`.

    Args:
        rate: per example; positive, infinite where nothing is kept.
        batch_size: B, examples per step; positive.

    Returns:
        The decay rate per step, in [0, 1).

    Raises:
        InvalidInputError: a value is out of its range.

    Source: as :func:`forgetting`.

    >>> decay_of_forgetting(rate=math.inf, batch_size=2)
    0.0
    """
    if not rate > 0:
        raise InvalidInputError(f"rate {rate:g}", "a positive number is required", "change it")
    return min(math.exp(-rate * positive("batch_size", batch_size)), BELOW_ONE)


def average_noise(*, beta: float) -> float:
    """Standard deviation of an average of independent gradients, over that of one gradient.

    sqrt((1 - beta)/(1 + beta)) for m <- beta m + (1 - beta) g. A step that is divided by the
    size of its own average (LAMB's by the norm of its direction) grows by the inverse.

    Args:
        beta: what is kept per step, in [0, 1).

    Returns:
        The share, in (0, 1].

    Raises:
        InvalidInputError: beta is out of its range.

    Source: stationary variance of an autoregression of order 1.

    >>> average_noise(beta=0.6)
    0.5
    """
    return math.sqrt((1 - fraction("beta", beta)) / (1 + beta))
