"""The optimizer that a recipe names, torch's or ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from noisescale.measure import real_step
from noisescale.records import Recipe
from noisescale.train import LAMB, LARS

_TAKES = {
    "lars": ("momentum", "nesterov", "weight_decay", "trust_coefficient"),
    "lamb": ("betas", "eps", "weight_decay"),
}


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Make the optimizer that a recipe names, over the parameters that are trained.

    Keys that the recipe leaves out take the optimizer's defaults; LARS and LAMB leave decay and
    trust ratio out for scalars and vectors.

    Args:
        model: the model; parameters with ``requires_grad=False`` are left out.
        recipe: its ``optimizer``, ``lr`` and the optimizer's own keys are used.

    Returns:
        An optimizer with one parameter group.

    Raises:
        InvalidInputError: the model has no trainable parameter, the recipe sets a key that
            the optimizer does not have, or the optimizer refuses the combination.

    >>> make_optimizer(nn.Linear(2, 1), Recipe(optimizer="lars", lr=2.0, batch_size=8)).defaults[
    ...     "momentum"
    ... ]
    0.9
    """
    if recipe.optimizer not in _TAKES:
        return real_step.make_optimizer(model, recipe)
    settings: dict[str, Any] = real_step.optimizer_settings(recipe, takes=_TAKES[recipe.optimizer])
    real_step.trainable_parameters(model)
    # By name, for what refuses a parameter to name it.
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if recipe.optimizer == "lars":
        return LARS(parameters, lr=recipe.lr, **settings)
    return LAMB(parameters, lr=recipe.lr, **settings)
