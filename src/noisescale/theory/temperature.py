"""Recipes stated per example: what a rate, a momentum, a decay mean whatever the batch size.

With the summed gradient g_sum = B g_mean, heavy ball as torch writes it (v <- m v + g_mean,
w <- w - lr v) moves the weights in the end by ``tau g_sum``: tau is the temperature. Nesterov
(w <- w - lr (g_mean + m v)) moves them as far in the end: 1 + m (1 + m + ...) = 1/(1 - m). With
dampening d (v <- m v + (1 - d) g_mean) they move 1 - d times as far, but for the very first
gradient, which torch does not dampen.
"""

from __future__ import annotations

import math

from noisescale.errors import InvalidInputError
from noisescale.theory.ranges import fraction, positive


def displacement(*, momentum: float = 0.0, dampening: float = 0.0) -> float:
    """How far a velocity carries one gradient in the end, over a step without one.

    (1 - d)/(1 - m), heavy ball and Nesterov alike; 1 without momentum, where torch ignores d.

    Args:
        momentum: m per step, in [0, 1).
        dampening: d, in [0, 1).

    Returns:
        The factor on the learning rate.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: sum of the geometric series of v <- m v + (1 - d) g.

    >>> displacement(momentum=0.75), displacement(momentum=0.75, dampening=0.75)
    (4.0, 1.0)
    """
    taken, lost = 1 - fraction("dampening", dampening), 1 - fraction("momentum", momentum)
    return taken / lost if momentum else 1.0


def temperature(
    *, lr: float, batch_size: float, momentum: float = 0.0, dampening: float = 0.0
) -> float:
    """Displacement that one example's gradient causes in the end: lr (1 - d)/((1 - m) B).

    Args:
        lr: learning rate of SGD on the mean gradient; positive.
        batch_size: B, examples per step; positive.
        momentum: m per step, in [0, 1); heavy ball or Nesterov.
        dampening: d, in [0, 1).

    Returns:
        tau, in rates per example.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: Smith et al. 2018 (arXiv:1711.00489), sec. 4: noise scale lr N / (B (1 - m)), here
    without N.

    >>> temperature(lr=0.5, batch_size=10, momentum=0.5)
    0.1
    """
    gain = displacement(momentum=momentum, dampening=dampening)
    return positive("lr", lr) * gain / positive("batch_size", batch_size)


def rate_at_temperature(
    *, tau: float, batch_size: float, momentum: float = 0.0, dampening: float = 0.0
) -> float:
    """Learning rate of a temperature: tau B (1 - m)/(1 - d), inverse of :func:`temperature`.

    Args:
        tau: rates per example; positive.
        batch_size: B, examples per step; positive.
        momentum: m per step at this batch size, in [0, 1).
        dampening: d, in [0, 1).

    Returns:
        The learning rate on the mean gradient.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: as :func:`temperature`. With m = (1 - mu)^B the limit of small mu B is tau mu B^2.

    >>> round(rate_at_temperature(tau=0.1, batch_size=20, momentum=0.9), 12)
    0.2
    """
    gain = displacement(momentum=momentum, dampening=dampening)
    return positive("tau", tau) * positive("batch_size", batch_size) / gain


def decay_per_example(*, decay: float, batch_size: float) -> float:
    """Decay mu of an average per example: decay = (1 - mu)^B.

    Args:
        decay: what is kept per step (momentum, beta, EMA decay), in [0, 1).
        batch_size: B, examples per step; positive.

    Returns:
        mu, in (0, 1]; 1 where nothing is kept.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: definition; Busbridge et al. 2023 (arXiv:2307.13813) for the EMA.

    >>> decay_per_example(decay=0.25, batch_size=2)
    0.5
    """
    positive("batch_size", batch_size)
    kept = fraction("decay", decay)
    return -math.expm1(math.log(kept) / batch_size) if kept else 1.0


def decay_per_step(*, mu: float, batch_size: float) -> float:
    """What is kept per step: (1 - mu)^B, the inverse of :func:`decay_per_example`.

    Args:
        mu: decay per example, in (0, 1].
        batch_size: B, examples per step; positive.

    Returns:
        The decay rate per step, in [0, 1).

    Raises:
        InvalidInputError: a value is out of its range.

    Source: as :func:`decay_per_example`.

    >>> decay_per_step(mu=0.5, batch_size=2)
    0.25
    """
    positive("batch_size", batch_size)
    if not 0 < mu <= 1:
        raise InvalidInputError(f"mu {mu:g}", "a decay per example in (0, 1] is required", "change")
    return math.exp(batch_size * math.log1p(-mu)) if mu < 1 else 0.0


def half_life(*, decay: float, batch_size: float) -> float:
    """Examples after which an average has forgotten half: B ln(1/2) / ln(decay).

    Args:
        decay: what is kept per step, in (0, 1).
        batch_size: B, examples per step; positive.

    Returns:
        The half-life, in examples.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: Marek et al. 2025 (arXiv:2507.07101), there in tokens.

    >>> half_life(decay=0.5, batch_size=32)
    32.0
    """
    positive("batch_size", batch_size)
    if not fraction("decay", decay):
        raise InvalidInputError("decay 0", "something must be kept per step", "give above 0")
    return batch_size * math.log(0.5) / math.log(decay)


def decay_of_half_life(*, examples: float, batch_size: float) -> float:
    """Decay rate per step of a half-life: 2^(-B / examples), the inverse of :func:`half_life`.

    Args:
        examples: half-life; positive.
        batch_size: B, examples per step; positive.

    Returns:
        What is kept per step, in [0, 1).

    Raises:
        InvalidInputError: a value is not positive.

    Source: as :func:`half_life`.

    >>> decay_of_half_life(examples=32, batch_size=64)
    0.25
    """
    positive("batch_size", batch_size)
    return float(2.0 ** (-batch_size / positive("examples", examples)))


def adam_temperature(*, lr: float, batch_size: float, momentum: float = 0.0) -> float:
    """Rate of a normalised step per example's standard deviation: lr / ((1 - m) sqrt(B)).

    Where noise dominates, sqrt(v) is s / sqrt(B) with s the standard deviation of one example's
    gradient: a step of lr g_mean / sqrt(v) is (lr / sqrt(B)) g_sum / s. Adam averages with
    weights that sum to 1 (m = 0 here); RMSProp, and LARS with |g| in place of sqrt(v), may have
    a velocity behind.

    Args:
        lr: learning rate; positive.
        batch_size: B, examples per step; positive.
        momentum: m of a velocity of normalised gradients, in [0, 1).

    Returns:
        The rate per example. It describes the training only while noise dominates v.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: Malladi et al. 2022 (arXiv:2205.10287), sec. 5 (square-root rule).

    >>> adam_temperature(lr=0.004, batch_size=16)
    0.001
    """
    gain = displacement(momentum=momentum)
    return positive("lr", lr) * gain / math.sqrt(positive("batch_size", batch_size))


def adam_rate(*, tau: float, batch_size: float, momentum: float = 0.0) -> float:
    """Learning rate of a normalised rate per example: tau (1 - m) sqrt(B).

    The inverse of :func:`adam_temperature`.

    Args:
        tau: rate per example; positive.
        batch_size: B, examples per step; positive.
        momentum: m per step at this batch size, in [0, 1).

    Returns:
        The learning rate.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: as :func:`adam_temperature`.

    >>> adam_rate(tau=0.001, batch_size=16)
    0.004
    """
    gain = displacement(momentum=momentum)
    return positive("tau", tau) * math.sqrt(positive("batch_size", batch_size)) / gain


def adam_eps_per_example(*, eps: float, batch_size: float) -> float:
    """Adam's eps beside one example's standard deviation: eps sqrt(B).

    Args:
        eps: torch's eps, outside the square root.
        batch_size: B, examples per step; positive.

    Returns:
        eps in the unit of one example's gradient.

    Raises:
        InvalidInputError: the batch size is not positive.

    Source: Malladi et al. 2022 (arXiv:2205.10287), sec. 5.

    >>> adam_eps_per_example(eps=1e-8, batch_size=4)
    2e-08
    """
    return eps * math.sqrt(positive("batch_size", batch_size))


def adam_eps(*, per_example: float, batch_size: float) -> float:
    """Adam's eps at a batch size: the inverse of :func:`adam_eps_per_example`.

    Args:
        per_example: eps in the unit of one example's gradient.
        batch_size: B, examples per step; positive.

    Returns:
        torch's eps.

    Raises:
        InvalidInputError: the batch size is not positive.

    Source: as :func:`adam_eps_per_example`.

    >>> adam_eps(per_example=2e-8, batch_size=4)
    1e-08
    """
    return per_example / math.sqrt(positive("batch_size", batch_size))


def shrinkage_per_example(
    *,
    lr: float,
    weight_decay: float,
    batch_size: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> float:
    """Share of the weights that weight decay takes per example: wd lr (1 - d)/((1 - m) B).

    Args:
        lr: learning rate.
        weight_decay: coupled (SGD) or decoupled (AdamW, with ``momentum=0``), as torch has it.
        batch_size: B, examples per step.
        momentum: m per step, in [0, 1).
        dampening: d, in [0, 1).

    Returns:
        The share per example; weights without gradients halve in ln(2)/share examples.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: Wang and Aitchison 2024 (arXiv:2405.13698), whose time-scale of AdamW it inverts.

    >>> shrinkage_per_example(lr=0.1, weight_decay=0.01, batch_size=10)
    0.0001
    """
    return weight_decay * temperature(
        lr=lr, batch_size=batch_size, momentum=momentum, dampening=dampening
    )


def weight_decay_of_shrinkage(
    *,
    shrinkage: float,
    lr: float,
    batch_size: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> float:
    """Weight decay of a shrinkage per example: the inverse of :func:`shrinkage_per_example`.

    Args:
        shrinkage: share of the weights per example.
        lr: learning rate at this batch size.
        batch_size: B, examples per step.
        momentum: m per step at this batch size, in [0, 1).
        dampening: d, in [0, 1).

    Returns:
        torch's weight_decay.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: as :func:`shrinkage_per_example`.

    >>> round(weight_decay_of_shrinkage(shrinkage=1e-4, lr=0.1, batch_size=10), 12)
    0.01
    """
    return shrinkage / temperature(
        lr=lr, batch_size=batch_size, momentum=momentum, dampening=dampening
    )
