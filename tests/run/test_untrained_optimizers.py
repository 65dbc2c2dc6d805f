"""RMSProp and Lion are converted, not trained: whoever trains refuses them in one line."""

from __future__ import annotations

import pytest
from torch import nn

from noisescale.errors import InvalidInputError
from noisescale.measure import real_step
from noisescale.records import Recipe
from noisescale.run.measuring import measure_workload
from noisescale.run.optimizers import make_optimizer
from noisescale.run.sweep.driver import sweep


@pytest.mark.parametrize("optimizer", ["rmsprop", "lion"])
def test_every_way_to_train_refuses_them(optimizer, tmp_path):
    recipe = Recipe(optimizer=optimizer, lr=0.1, batch_size=8)
    overrides = {"optimizer": optimizer, "lr": "0.01"}
    ways = [
        lambda: real_step.make_optimizer(nn.Linear(2, 1), recipe),
        lambda: make_optimizer(nn.Linear(2, 1), recipe),
        lambda: measure_workload("digits", overrides=overrides, steps=2),
        lambda: sweep(
            "digits",
            targets=["validation_error<0.5"],
            batch_sizes=[8],
            store=tmp_path,
            overrides=overrides,
        ),
    ]
    for way in ways:
        with pytest.raises(InvalidInputError, match=optimizer) as refusal:
            way()
        assert "\n" not in str(refusal.value)


def test_alpha_is_for_rmsprop_only():
    with pytest.raises(InvalidInputError, match=r"alpha=0\.9"):
        real_step.make_optimizer(nn.Linear(2, 1), Recipe(lr=0.1, batch_size=8, alpha=0.9))
    with pytest.raises(InvalidInputError, match=r"alpha 1\.5"):
        Recipe(optimizer="rmsprop", lr=0.1, batch_size=8, alpha=1.5)
