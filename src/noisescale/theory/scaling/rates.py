"""Rules that change the learning rate by a power of the batch size, and nothing else."""

from __future__ import annotations

from typing import Final

from noisescale.records import Recipe
from noisescale.theory.scaling.rule import Change, Facts, Rule, shown

EVERY: Final = ("sgd", "momentum", "adam", "lars", "lamb", "rmsprop", "lion")
NORMALISED: Final = ("adam", "lars", "lamb", "rmsprop", "lion")
"""Kinds whose step is divided by a size of the batch gradient itself."""


_NORMALISED_LINEAR = {
    "assumption": "the size that a step is divided by is that of the mean gradient, not of noise",
    "validity": "no range is known; where noise dominates that size the rate comes out too large",
    "preserves": "lr/B",
}
_SGD_ROOT = {
    "source": (
        "Hoffer et al. 2017 (arXiv:1705.08741), sec. 4; Krizhevsky 2014 (arXiv:1404.5997), sec. 5"
    ),
    "assumption": "the noise of a step matters, not that of an example",
    "validity": "no range is known, it failed in a third of our conversions",
    "preserves": "covariance of one step",
}
_LAMB_ROOT = {
    "source": "You et al. 2020 (arXiv:1904.00962), sec. 4",
    "assumption": "noise dominates the size that a step is divided by",
    "validity": "both batch sizes below the noise scale; no check of our own",
    "preserves": "displacement per example",
}
_LARS_ROOT = {
    **_LAMB_ROOT,
    "source": "as You et al. 2020 (arXiv:1904.00962), sec. 4, for LAMB: |g| falls as 1/sqrt(B)",
    "status": "assumed",
}


def _none(recipe: Recipe, batch_size: int, facts: Facts) -> Change:
    del batch_size, facts
    return Change({}, f"the rate stays at {shown(recipe.lr)}: curvature limits it, not noise")


def _linear(recipe: Recipe, batch_size: int, facts: Facts) -> Change:
    del facts
    factor = batch_size / recipe.batch_size
    lr = recipe.lr * factor
    return Change(
        {"lr": lr},
        f"the rate times {shown(factor)} = {shown(lr)}: every example moves the weights as far as"
        f" at batch {recipe.batch_size}",
    )


def _square_root(recipe: Recipe, batch_size: int, facts: Facts) -> Change:
    del facts
    factor = (batch_size / recipe.batch_size) ** 0.5
    lr = recipe.lr * factor
    kept = (
        "the noise of one step keeps its covariance"
        if recipe.optimizer == "sgd"
        else "the step is divided by the size of the batch gradient, which falls with the root"
    )
    return Change(
        {"lr": lr},
        f"the rate times the square root of {shown(batch_size / recipe.batch_size)} = {shown(lr)}:"
        f" {kept}",
    )


NONE = Rule(
    name="none",
    optimizers=EVERY,
    source="Shallue et al. 2019 (arXiv:1811.03600), sec. 4: no rule held on every workload",
    status="paper",
    assumption="the rate is limited by curvature at both batch sizes",
    validity="both batch sizes above the noise scale",
    preserves="the mean of one step",
    exact=True,
    law=_none,
)
LINEAR = Rule(
    name="linear",
    optimizers=EVERY,
    source="Goyal et al. 2017 (arXiv:1706.02677), sec. 2.1",
    status="paper",
    assumption="noise dominates the batch gradient, and the rate is far below stability",
    validity=(
        "both batch sizes well below the noise scale; upwards it diverged or failed in half of"
        " our SGD conversions by factors up to 32"
    ),
    preserves="displacement per example to first order in the rate (SGD), momentum per step",
    exact=True,
    spoken={
        "sgd": {"preserves": "displacement per example to first order in the rate"},
        **dict.fromkeys(NORMALISED, _NORMALISED_LINEAR),
    },
    law=_linear,
)
KEEP_MOMENTUM = Rule(
    name="keep-momentum",
    optimizers=("momentum",),
    source="Goyal et al. 2017 (arXiv:1706.02677), secs. 2.1 and 3",
    status="paper",
    assumption="noise dominates; the velocity forgets within few steps at both batch sizes",
    validity="both batch sizes well below the noise scale, the rate below 2 (1 + m)/curvature",
    preserves="temperature lr/((1 - m) B), momentum per step",
    exact=True,
    law=_linear,
)
SQUARE_ROOT = Rule(
    name="square-root",
    optimizers=EVERY,
    source=(
        "Hoffer et al. 2017 (arXiv:1705.08741), sec. 4 for SGD; You et al. 2020"
        " (arXiv:1904.00962), sec. 4 for LAMB; Krizhevsky 2014 (arXiv:1404.5997), sec. 5"
    ),
    status="paper",
    assumption="SGD: the noise of a step matters, not that of an example; others: noise dominates",
    validity=(
        "SGD: no range is known, it failed in a third of our conversions; normalised steps: both"
        " batch sizes below the noise scale"
    ),
    preserves="SGD: covariance of one step; normalised steps: displacement per example",
    exact=True,
    spoken={"sgd": _SGD_ROOT, "momentum": _SGD_ROOT, "lamb": _LAMB_ROOT, "lars": _LARS_ROOT},
    law=_square_root,
)
