"""The optimizers that recipes name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from noisescale.run.measuring import measure_workload
from noisescale.run.optimizers import make_optimizer
from noisescale.train import LAMB, LARS


@pytest.mark.parametrize(
    ("keys", "kind", "settings"),
    [
        ({"lr": 0.1}, torch.optim.SGD, {"momentum": 0}),
        (
            {"optimizer": "lars", "lr": 4.0, "trust_coefficient": 0.01, "nesterov": True},
            LARS,
            {"lr": 4.0, "trust_coefficient": 0.01, "nesterov": True, "momentum": 0.9},
        ),
        (
            {"optimizer": "lamb", "lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1},
            LAMB,
            {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-6},
        ),
    ],
)
def test_recipes_make_their_optimizer(keys, kind, settings):
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    made = make_optimizer(model, Recipe(batch_size=8, **keys))
    assert type(made) is kind
    assert {key: made.param_groups[0][key] for key in settings} == settings
    assert made.param_groups[0]["params"] == [model.weight]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"optimizer": "lamb", "momentum": 0.9}, "momentum=0.9.*lamb takes betas"),
        ({"optimizer": "lars", "dampening": 0.1}, "dampening"),
        ({"optimizer": "lars", "momentum": 0.0, "nesterov": True}, "nesterov"),
    ],
)
def test_keys_of_other_optimizers_are_refused(keys, named):
    with pytest.raises(InvalidInputError, match=named):
        make_optimizer(nn.Linear(2, 2), Recipe(lr=0.1, batch_size=8, **keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer": "lars", "lr": 0.5, "trust_coefficient": 0.05},
        {"optimizer": "lamb", "lr": 0.02},
    ],
    ids=lambda keys: keys["optimizer"],
)
def test_a_measured_run_trains_with_them(keys):
    found = measure_workload("digits", steps=40, overrides=keys)
    assert found.trajectory[-1].loss < 0.8 * found.trajectory[0].loss
