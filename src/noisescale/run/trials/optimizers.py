"""The optimizer of a recipe for one model: the slow reference of the stacked ones."""

from __future__ import annotations

import torch
from torch import nn

from noisescale.measure.real_step import make_optimizer, optimizer_settings
from noisescale.records import Recipe
from noisescale.train import LAMB, LARS

_LAYERWISE: dict[str, tuple[type[LARS] | type[LAMB], tuple[str, ...]]] = {
    "lars": (LARS, ("momentum", "nesterov", "weight_decay", "trust_coefficient")),
    "lamb": (LAMB, ("betas", "eps", "weight_decay")),
}


def make_trial_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Make the optimizer that a recipe names, LARS and LAMB included.

    Keys that the recipe leaves out take the optimizer's defaults.

    Raises:
        InvalidInputError: the recipe sets a key that the optimizer does not have, or the model
            has nothing to train.
    """
    if recipe.optimizer not in _LAYERWISE:
        return make_optimizer(model, recipe)
    kind, takes = _LAYERWISE[recipe.optimizer]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return kind(named, lr=recipe.lr, **optimizer_settings(recipe, takes=takes))
