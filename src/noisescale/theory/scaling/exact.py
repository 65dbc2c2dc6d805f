"""Rules that keep the recipe's per-example statement."""

from __future__ import annotations

from noisescale.records import Recipe
from noisescale.theory.per_example import PerExample
from noisescale.theory.scaling.rule import Change, Facts, Rule, shown

KEYS = ("lr", "momentum", "dampening", "betas", "alpha", "eps")


def restated(recipe: Recipe, batch_size: int) -> dict[str, object]:
    """Return the optimizer's keys of a recipe restated per example at another batch size."""
    new = PerExample.of(recipe).at(batch_size)
    keys = (key for key in KEYS if hasattr(new, key))
    return {key: getattr(new, key) for key in keys if getattr(new, key) is not None}


def _exact(recipe: Recipe, batch_size: int, facts: Facts) -> Change:
    del facts
    keys = restated(recipe, batch_size)
    lr = float(str(keys["lr"]))
    return Change(
        keys,
        f"the rate becomes {shown(lr)}: displacement and memory per example stay those of batch"
        f" {recipe.batch_size}",
    )


EXACT = Rule(
    name="exact",
    optimizers=("sgd", "momentum", "adam", "lars", "lamb", "rmsprop"),
    source="derived from the temperature of Smith et al. 2018 (arXiv:1711.00489), sec. 4",
    status="measured",
    assumption="the rate is far below stability at the new batch size; normalised: noise dominates",
    validity=(
        "downwards; upwards with momentum it leaves stability for factors above about 1/(1 - m)"
        " (on digits it diverged from a factor of 8 at m = 0.9)"
    ),
    preserves="displacement per example, and memory of the averages in examples",
    exact=True,
    law=_exact,
)
