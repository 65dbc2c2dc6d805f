"""Rules that keep the recipe's per-example statement, by the memory or against it."""

from __future__ import annotations

from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.records import Recipe
from noisescale.theory.averages import BELOW_ONE
from noisescale.theory.per_example import PerExample
from noisescale.theory.scaling.rule import Change, Facts, Rule, shown

_OF_SGD = {"assumption": "the rate is far below stability at the new batch size"}
_OF_NORMALISED = {
    "status": "assumed",
    "assumption": "noise dominates the size that a step is divided by",
    "validity": "downwards; no check of our own",
}

KEYS = ("lr", "momentum", "dampening", "betas", "alpha", "eps")

BUFFER_SHARE = 0.1
"""Share of the training beyond which a velocity's memory is called long. (assumed)"""


def restated(recipe: Recipe, batch_size: int) -> dict[str, Any]:
    """Return the optimizer's keys of a recipe restated per example at another batch size."""
    new = PerExample.of(recipe).at(batch_size)
    return {key: getattr(new, key) for key in KEYS if getattr(new, key) is not None}


def _exact(recipe: Recipe, batch_size: int, facts: Facts) -> Change:
    del facts
    keys = restated(recipe, batch_size)
    memory = ""
    if recipe.momentum:
        memory = f" and the momentum {shown(recipe.momentum)} becomes {shown(keys['momentum'])}"
    return Change(
        keys,
        f"the rate becomes {shown(keys['lr'])}{memory}: displacement and memory per example stay"
        f" those of batch {recipe.batch_size}",
    )


def traded_momentum(*, momentum: float, factor: float) -> float:
    """Momentum that keeps the temperature at the same rate: 1 - m' = (1 - m)/kappa.

    Args:
        momentum: m at the old batch size, in [0, 1).
        factor: kappa, new batch size over old; at least 1 - m, where no momentum is left.

    Returns:
        m', in [0, 1).

    Raises:
        InvalidInputError: the factor is below 1 - m.

    Source: Smith et al. 2018 (arXiv:1711.00489), sec. 4: B ~ 1/(1 - m).

    >>> traded_momentum(momentum=0.5, factor=4)
    0.875
    """
    new = 1 - (1 - momentum) / factor
    if new < -1e-12:  # rounding of the factor 1 - m itself
        raise InvalidInputError(
            f"rule momentum-trade with momentum {momentum:g} and {factor:.4g} times the batch",
            f"a factor of at least 1 - m = {1 - momentum:.4g} is required",
            "go down by another rule (keep-momentum or exact)",
        )
    return min(max(new, 0.0), BELOW_ONE)


def _trade(recipe: Recipe, batch_size: int, facts: Facts) -> Change:
    del facts
    old = recipe.momentum or 0.0
    new = traded_momentum(momentum=old, factor=batch_size / recipe.batch_size)
    if not new and (recipe.dampening or recipe.nesterov):
        raise InvalidInputError(
            f"rule momentum-trade to batch {batch_size}",
            "no momentum would be left, and dampening and nesterov need some",
            "go down by another rule (keep-momentum or exact)",
        )
    keys: dict[str, Any] = {"momentum": new}
    if recipe.dampening and not old:
        keys["dampening"] = 0.0  # torch ignored it without momentum
    why = (
        f"the rate stays at {shown(recipe.lr)} and 1 - m goes from {shown(1 - old)} to"
        f" {shown(1 - new)}: the temperature lr/((1 - m) B) stays"
    )
    return Change(keys, why, _memory_warning(recipe, batch_size, new))


def _memory_warning(recipe: Recipe, batch_size: int, momentum: float) -> tuple[str, ...]:
    total = PerExample.of(recipe).total
    memory = batch_size / (1 - momentum)
    if total is None or memory <= BUFFER_SHARE * total:
        return ()
    return (
        f"the velocity remembers {memory:.4g} {recipe.unit} of {total:,}: it takes about that long"
        " to fill, and the training is the longer for it (Smith et al. 2018, sec. 4)",
    )


EXACT = Rule(
    name="exact",
    optimizers=("sgd", "momentum", "adam", "lars", "lamb", "rmsprop"),
    source=(
        "derived from the temperature of Smith et al. 2018 (arXiv:1711.00489), sec. 4, and a decay"
        " per example"
    ),
    status="measured",
    assumption="the rate is far below stability at the new batch size; normalised: noise dominates",
    validity=(
        "downwards; upwards with momentum it leaves stability for factors above about 1/(1 - m)"
        " (on digits it diverged from a factor of 8 at m = 0.9)"
    ),
    preserves="displacement per example, and memory of the averages in examples",
    exact=True,
    spoken={
        "sgd": _OF_SGD,
        "momentum": _OF_SGD,
        "lars": _OF_NORMALISED,
        "lamb": _OF_NORMALISED,
    },
    law=_exact,
)
MOMENTUM_TRADE = Rule(
    name="momentum-trade",
    optimizers=("sgd", "momentum"),
    source="Smith et al. 2018 (arXiv:1711.00489), sec. 4; Smith and Le 2018 (arXiv:1710.06451)",
    status="paper",
    assumption=(
        "noise dominates, and a memory of kappa^2 B/(1 - m) examples is short beside the training"
    ),
    validity=(
        "upwards; algebraically down to a factor of 1 - m, with the narrower stability of less"
        " momentum; the papers saw it cost accuracy where rates did not"
    ),
    preserves="temperature lr/((1 - m) B), learning rate",
    exact=True,
    law=_trade,
)
