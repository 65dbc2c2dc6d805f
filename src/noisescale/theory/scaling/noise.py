"""Rules that use the measured noise scale."""

from __future__ import annotations

import math

from noisescale.records import Recipe
from noisescale.theory.scaling.rate_noise import memory_of, rate_cap, rate_noise_scale
from noisescale.theory.scaling.rule import Change, Facts, Rule, shown
from noisescale.theory.scaling.stability import BEYOND, noise_factor

_CAPPED = (
    "McCandlish et al. 2018 (arXiv:1812.06162), eq. 2.6; the cap: Cohen et al. 2021"
    " (arXiv:2103.00065)"
)
_ROOTED = "McCandlish et al. 2018 (arXiv:1812.06162), eq. 2.6 and app. A.3 (exponent 1/2)"
_JOHNSON = "Johnson et al. 2020 (arXiv:2007.05105), algorithm 1"
_SMALL = "factors up to 32 both ways on small networks"
_ASSUMPTION = (
    "the rate is the best one at the old batch size, the noise scale that of the run, online"
)

ROOTED = ("adam", "rmsprop")
"""Kinds that follow the square root of what SGD's rate follows."""


def known(value: float | None) -> float:
    """Return a fact that the rule's ``needs`` has checked."""
    assert value is not None
    return value


def _factor(recipe: Recipe, batch_size: int, facts: Facts) -> float:
    gain = noise_factor(noise_scale=known(facts.noise_scale), old=recipe.batch_size, new=batch_size)
    return math.sqrt(gain) if recipe.optimizer_kind in ROOTED else gain


def _noise_aware(recipe: Recipe, batch_size: int, facts: Facts) -> Change:
    Bn = rate_noise_scale(noise_scale=known(facts.noise_scale), momentum=memory_of(recipe))
    factor = _factor(recipe, batch_size, Facts(noise_scale=Bn))
    lr, limit = recipe.lr * factor, rate_cap(recipe, facts.curvature)
    root = "the square root of " if recipe.optimizer_kind in ROOTED else ""
    why = (
        f"the rate times {shown(factor)} = {shown(lr)}, {root}(1 + Bn/{recipe.batch_size})/"
        f"(1 + Bn/{batch_size}) with Bn = {shown(Bn)} from the noise scale"
        f" {shown(known(facts.noise_scale))}"
    )
    # Only a raised rate is capped, and never below the old one: that one was seen to be stable,
    # and a larger batch has the same mean step with less noise.
    if limit is not None and factor > 1 and lr > limit:
        lr = max(limit, recipe.lr)
        why += f", lowered to {shown(lr)}: {BEYOND:g} times the stability limit is {shown(limit)}"
    return Change({"lr": lr}, why)


def _adascale(recipe: Recipe, batch_size: int, facts: Facts) -> Change:
    factor = _factor(recipe, batch_size, facts)
    lr = recipe.lr * factor
    gain = factor**2 if recipe.optimizer_kind in ROOTED else factor
    return Change(
        {"lr": lr},
        f"the rate times {shown(factor)} = {shown(lr)}; each step counts for {shown(gain)} of the"
        f" old ones, so that the schedule ends after 1/{shown(gain)} of the old steps",
    )


def surge_height(*, noise_scale: float, batch_size: float) -> float:
    """Best rate of a sign-like step over its largest: 2 / (sqrt(Bn/B) + sqrt(B/Bn)).

    Args:
        noise_scale: Bn; positive.
        batch_size: B, in the same unit.

    Returns:
        In (0, 1]: it rises as sqrt(B), is 1 at Bn and falls again.

    Source: Li et al. 2024 (arXiv:2405.14578).

    >>> surge_height(noise_scale=64, batch_size=64)
    1.0
    >>> round(surge_height(noise_scale=64, batch_size=4 * 64), 12)
    0.8
    """
    root = math.sqrt(noise_scale / batch_size)
    return 2 / (root + 1 / root)


def _surge(recipe: Recipe, batch_size: int, facts: Facts) -> Change:
    scale = known(facts.noise_scale)
    new = surge_height(noise_scale=scale, batch_size=batch_size)
    factor = new / surge_height(noise_scale=scale, batch_size=recipe.batch_size)
    lr = recipe.lr * factor
    return Change(
        {"lr": lr},
        f"the rate times {shown(factor)} = {shown(lr)}: the best rate of signs rises up to the"
        f" noise scale {shown(scale)} and falls beyond it",
    )


NOISE_AWARE = Rule(
    name="noise-aware",
    optimizers=("sgd", "momentum", "adam", "rmsprop"),
    source=(
        "McCandlish et al. 2018 (arXiv:1812.06162), eq. 2.6 and app. A.3 (exponent 1/2 for Adam);"
        " the cap: Cohen et al. 2021 (arXiv:2103.00065), 2022 (arXiv:2207.14484)"
    ),
    status="measured",
    assumption=(
        "the rate is the best one at the old batch size, the noise scale that of the run, online;"
        " the curvature an upper quantile along it"
    ),
    validity="factors up to 32 both ways on small networks; upwards better with the curvature",
    preserves="distance from the best rate, momentum and betas per step",
    exact=False,
    spoken={
        "sgd": {"source": _CAPPED, "preserves": "distance from the best rate"},
        "momentum": {"source": _CAPPED, "preserves": "distance from the best rate, momentum"},
        "adam": {
            "source": _ROOTED,
            "assumption": _ASSUMPTION,
            "validity": _SMALL,
            "preserves": "distance from the best rate, betas per step",
        },
        "rmsprop": {
            "source": _ROOTED,
            "status": "assumed",
            "assumption": _ASSUMPTION,
            "validity": "as for Adam; no check of our own",
            "preserves": "distance from the best rate, averages per step",
        },
    },
    needs=("noise_scale",),
    law=_noise_aware,
)
ADASCALE = Rule(
    name="adascale",
    optimizers=("sgd", "momentum", "adam"),
    source=(
        "Johnson et al. 2020 (arXiv:2007.05105), algorithm 1; the square root for Adam: Qiao et al."
        " 2021 (arXiv:2008.12260), as in adaptdl"
    ),
    status="paper",
    assumption="the gain is that of one noise scale, held over the run; AdaScale follows it",
    validity=(
        "the rate is that of noise-aware without its cap; the schedule must count gain, not steps"
    ),
    preserves="expected progress of one old step per unit of gain",
    exact=True,
    spoken={
        "sgd": {"source": _JOHNSON},
        "momentum": {"source": _JOHNSON},
        "adam": {
            "source": (
                "Qiao et al. 2021 (arXiv:2008.12260), as in adaptdl: the square root of AdaScale's"
                " gain"
            ),
            "validity": "no check of our own; the schedule must count gain, not steps",
        },
    },
    needs=("noise_scale",),
    law=_adascale,
)
SURGE = Rule(
    name="surge",
    optimizers=("adam", "lion"),
    source="Li et al. 2024 (arXiv:2405.14578), the surge formula",
    status="paper",
    assumption="steps are signs; B_simple stands for the noise scale of signs (assumed)",
    validity="the rate is the best one at the old batch size; no check of our own",
    preserves="distance from the best rate of sign descent, averages per step",
    exact=True,
    needs=("noise_scale",),
    law=_surge,
)
