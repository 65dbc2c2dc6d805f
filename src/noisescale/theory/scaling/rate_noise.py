"""The noise scale that the best rate follows, and the stability that it must keep.

Both constants were fitted to tuned trainings of the digits network alone
(benchmarks/training_regret.py) and then frozen.
"""

from __future__ import annotations

import math

from noisescale.records import Recipe
from noisescale.theory.per_example import ADAM_BETAS
from noisescale.theory.scaling.stability import BEYOND, rate_limit


def rate_noise_scale(*, noise_scale: float, momentum: float = 0.0) -> float:
    """Noise scale behind the best rate: Bn sqrt((1 + m)/(1 - m)).

    An average of gradients over 1/(1 - m) steps leaves less noise in the direction of a step,
    so the best rate of an optimizer with momentum saturates at a larger batch than that of
    plain SGD. (measured at m = 0 and 0.9: factors of 1 and 4 on the digits network, where 2 and
    8 are within 1.5 times the tuned steps as well; the form between is assumed)

    Args:
        noise_scale: Bn, the online B_simple at the old batch size; positive.
        momentum: m of heavy ball, or Adam's beta1, in [0, 1).

    Returns:
        The noise scale to use in (1 + Bn/B)/(1 + Bn/B'), in the same unit.

    Source: McCandlish et al. 2018 (arXiv:1812.06162), eq. 2.6 and app. A.3, where B_noise is
    fitted rather than measured for optimizers other than SGD; the factor is measured here.

    >>> rate_noise_scale(noise_scale=10.0), rate_noise_scale(noise_scale=10.0, momentum=0.6)
    (10.0, 20.0)
    """
    return noise_scale * math.sqrt((1 + momentum) / (1 - momentum))


def memory_of(recipe: Recipe) -> float:
    """Return what the recipe keeps of its average of gradients per step."""
    if recipe.optimizer_kind == "adam":
        return ADAM_BETAS[0] if recipe.betas is None else recipe.betas[0]
    return recipe.momentum or 0.0


def rate_cap(recipe: Recipe, curvature: float | None) -> float | None:
    """Return the largest rate that a conversion raises to; None where nothing caps.

    Adam is not capped: the largest eigenvalue of its preconditioned Hessian belongs to weights
    with tiny second moments, which grow as soon as the weights move. (measured: 500,000 on the
    digits network, whose limit is a hundredth of the best rate)

    Args:
        recipe: its optimizer and momenta are used.
        curvature: upper quantile along the run, see
            :class:`~noisescale.theory.scaling.rule.Facts`.
    """
    if curvature is None or recipe.optimizer != "sgd":
        return None
    limit = rate_limit(recipe, curvature)
    return None if limit is None else BEYOND * limit
