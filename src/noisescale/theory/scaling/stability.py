"""Rates beyond which a step on a quadratic grows: one bound for each optimizer."""

from __future__ import annotations

import math

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from noisescale.theory.per_example import ADAM_BETAS

BEYOND = 1.5
"""A raised rate may lie this many times beyond the stability limit of the curvature's upper
quantile. (measured on the digits network, where tuned rates lie up to 1.9 times beyond it, a larger
rate finds flatter ground: the least of 1, 1.25, 1.5, 1.75 and 2 with which 90 % of the conversions
of plain SGD took at most 1.25 times the tuned steps. With 2 those of MNIST overshot at batch sizes
where noise still narrows stability)"""


def largest_stable_rate(
    *, curvature: float, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False
) -> float:
    """Rate at which SGD as torch writes it stops to contract along a direction of curvature h.

    2/h; heavy ball 2 (1 + m)/h; Nesterov 2 (1 + m)/((1 + 2 m) h); with dampening d the
    velocity takes (1 - d) g, and the heavy-ball bound is divided by 1 - d.

    Args:
        curvature: h, largest eigenvalue of the Hessian of the mean loss; positive.
        momentum: m per step, in [0, 1).
        dampening: d, in [0, 1); without momentum torch ignores it.
        nesterov: whether torch's nesterov is on (momentum without dampening).

    Returns:
        The learning rate: below it the mean converges, above it the mean diverges.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: Cohen et al. 2021 (arXiv:2103.00065), sec. 2 and app. B; derived from
    z^2 - (1 + m - lr h) z + m = 0 and, for Nesterov, z^2 - (1 + m)(1 - lr h) z + m (1 - lr h)
    = 0, whose roots leave the unit disc at z = -1.

    >>> largest_stable_rate(curvature=2.0), largest_stable_rate(curvature=2.0, momentum=0.5)
    (1.0, 1.5)
    >>> largest_stable_rate(curvature=2.0, momentum=0.5, nesterov=True)
    0.75
    """
    _in_range(curvature, momentum, dampening)
    if not momentum:
        return 2 / curvature
    if nesterov:
        return 2 * (1 + momentum) / ((1 + 2 * momentum) * curvature)
    return 2 * (1 + momentum) / ((1 - dampening) * curvature)


def adam_largest_stable_rate(*, curvature: float, beta1: float) -> float:
    """Rate at which Adam with a frozen preconditioner stops to contract.

    2 (1 + beta1)/((1 - beta1) h): heavy ball whose dampening is its momentum.

    Args:
        curvature: h, largest eigenvalue of P^-1/2 H P^-1/2, P = sqrt(v) + eps; positive.
        beta1: in [0, 1).

    Returns:
        The learning rate.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: Cohen et al. 2022 (arXiv:2207.14484), sec. 3: 38/lr at beta1 = 0.9.

    >>> round(adam_largest_stable_rate(curvature=38.0, beta1=0.9), 12)
    1.0
    """
    return largest_stable_rate(curvature=curvature, momentum=beta1, dampening=beta1)


def noise_factor(*, noise_scale: float, old: float, new: float) -> float:
    """How much more a batch of ``new`` examples allows than one of ``old``.

    (1 + Bn/B)/(1 + Bn/B'): the best rate's ratio, and E|g_B|^2 / E|g_B'|^2.

    Args:
        noise_scale: Bn, in the unit of the batch sizes; positive.
        old: B.
        new: B'.

    Returns:
        The ratio; B'/B while both are far below Bn, 1 while both are far above it.

    Source: McCandlish et al. 2018 (arXiv:1812.06162), eqs. 2.6 and 2.10.

    >>> noise_factor(noise_scale=96, old=32, new=96)
    2.0
    """
    return (1 + noise_scale / old) / (1 + noise_scale / new)


def rate_limit(recipe: Recipe, curvature: float) -> float | None:
    """Return the largest stable rate of a recipe; None where no bound is known.

    Args:
        recipe: optimizer and its momenta; its rate is not used.
        curvature: as :class:`~noisescale.theory.scaling.rule.Facts` has it, at this batch size.
    """
    momentum = recipe.momentum or 0.0
    if recipe.optimizer == "sgd":
        return largest_stable_rate(
            curvature=curvature,
            momentum=momentum,
            dampening=recipe.dampening or 0.0,
            nesterov=bool(recipe.nesterov),
        )
    if recipe.optimizer == "rmsprop":
        return largest_stable_rate(curvature=curvature, momentum=momentum)
    if recipe.optimizer_kind == "adam":
        beta1 = ADAM_BETAS[0] if recipe.betas is None else recipe.betas[0]
        return adam_largest_stable_rate(curvature=curvature, beta1=beta1)
    return None


def curvature_at(recipe: Recipe, curvature: float, noise_scale: float | None, new: int) -> float:
    """Return the curvature that the optimizer sees at another batch size.

    SGD sees the Hessian whatever the batch size. Adam and RMSProp divide by sqrt(v), and
    E v = G^2 + s^2/B falls as the batch grows: their preconditioned curvature rises by
    sqrt((1 + Bn/B)/(1 + Bn/B')). (assumed: one noise scale for every coordinate)

    Args:
        recipe: at the old batch size.
        curvature: there.
        noise_scale: Bn; without it the curvature is left as it is.
        new: the new batch size.
    """
    if recipe.optimizer == "sgd" or noise_scale is None:
        return curvature
    return curvature * math.sqrt(
        noise_factor(noise_scale=noise_scale, old=recipe.batch_size, new=new)
    )


def stability_warnings(
    old: Recipe, new: Recipe, curvature: float | None, noise_scale: float | None
) -> tuple[str, ...]:
    """Say where a restated rate lies beyond stability; nothing where no curvature is known.

    Nothing is said of Adam and RMSProp: see :func:`~noisescale.theory.scaling.rate_noise.rate_cap`.
    """
    if curvature is None or old.optimizer != "sgd":
        return ()
    limit = rate_limit(new, curvature_at(old, curvature, noise_scale, new.batch_size))
    if limit is None or new.lr <= BEYOND * limit:
        return ()
    before = rate_limit(old, curvature)
    if before is not None and old.lr > BEYOND * before:
        return (
            f"the old rate {old.lr:.4g} is itself far beyond the stability limit {before:.4g} of"
            f" the curvature {curvature:.4g}: the curvature is that of a spike, or not of this run",
        )
    return (
        f"the rate {new.lr:.4g} is more than {BEYOND:g} times the stability limit {limit:.4g} of"
        f" the curvature {curvature:.4g}",
    )


def _in_range(curvature: float, momentum: float, dampening: float) -> None:
    if not (curvature > 0 and math.isfinite(curvature)):
        raise InvalidInputError(
            f"curvature {curvature:g}", "a positive finite number is required", "measure it"
        )
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        if not 0 <= value < 1:
            raise InvalidInputError(f"{name} {value:g}", "a number in [0, 1) is required", "change")
