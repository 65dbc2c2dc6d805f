"""How large a batch a temperature tolerates, and what temperature data of a size tolerate."""

from __future__ import annotations

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from noisescale.theory.ranges import positive
from noisescale.theory.scaling.stability import largest_stable_rate, rate_limit
from noisescale.theory.temperature import displacement


def largest_batch_size(
    *, tau: float, curvature: float, momentum: float = 0.0, nesterov: bool = False
) -> float:
    """Largest batch whose rate at a temperature is stable: B with tau = lr/((1 - m) B).

    2 (1 + m)/((1 - m) h tau); Nesterov divides by 1 + 2 m. Dampening cancels. A lower
    temperature tolerates a larger batch in proportion, and so does more momentum.

    Args:
        tau: :func:`~noisescale.theory.temperature.temperature`; positive.
        curvature: h, largest eigenvalue of the Hessian (an upper quantile along the run);
            positive.
        momentum: m per step, kept as the batch grows, in [0, 1).
        nesterov: whether torch's nesterov is on.

    Returns:
        The batch size, not rounded.

    Raises:
        InvalidInputError: a value is out of its range.

    Source: :func:`~noisescale.theory.scaling.stability.largest_stable_rate` over tau;
    Smith et al. 2018 (arXiv:1711.00489), sec. 4 for B ~ 1/(1 - m).

    >>> largest_batch_size(tau=0.01, curvature=2.0)
    100.0
    >>> largest_batch_size(tau=0.01, curvature=2.0, momentum=0.5)
    300.0
    """
    rate = largest_stable_rate(curvature=curvature, momentum=momentum, nesterov=nesterov)
    return rate * displacement(momentum=momentum) / positive("tau", tau)


def largest_batch_of(recipe: Recipe, curvature: float) -> float:
    """Return the largest batch at which a recipe's temperature is stable, momentum kept.

    Args:
        recipe: of SGD, with or without momentum.
        curvature: h, largest eigenvalue of the Hessian; positive.

    Raises:
        InvalidInputError: the optimizer divides by the size of its gradients, so that no bound
            follows from the Hessian.
    """
    if recipe.optimizer != "sgd":
        raise InvalidInputError(
            f"optimizer {recipe.optimizer!r}",
            "the largest batch that a temperature tolerates is known for sgd only",
            "leave out the curvature",
        )
    limit = rate_limit(recipe, curvature)
    assert limit is not None
    return recipe.batch_size * limit / recipe.lr


def temperature_for_data(*, tau: float, old_size: float, new_size: float) -> float:
    """Temperature for training data of another size: tau N/N'.

    Args:
        tau: at the old size; positive.
        old_size: N, training examples; positive.
        new_size: N'; positive.

    Returns:
        The temperature late in training, where it sets how sharply the weights are confined.
        Early in training the best temperature does not depend on N, and McCandlish et al. 2018
        and Shallue et al. 2019 saw no dependence of the largest useful batch on N.

    Raises:
        InvalidInputError: a value is not positive.

    Source: Smith and Le 2018 (arXiv:1710.06451), sec. 5: the best batch grows as N at one rate.

    >>> temperature_for_data(tau=0.01, old_size=1000, new_size=4000)
    0.0025
    """
    return positive("tau", tau) * positive("old_size", old_size) / positive("new_size", new_size)
