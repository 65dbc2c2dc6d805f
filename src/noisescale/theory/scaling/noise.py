"""Rules that use the measured noise scale."""

from __future__ import annotations

import math

from noisescale.records import Recipe
from noisescale.theory.scaling.rule import Change, Facts, Rule, shown
from noisescale.theory.scaling.stability import curvature_at, noise_factor, rate_limit

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
    factor = _factor(recipe, batch_size, facts)
    lr, limit = recipe.lr * factor, None
    if facts.curvature is not None:
        limit = rate_limit(
            recipe, curvature_at(recipe, facts.curvature, facts.noise_scale, batch_size)
        )
    root = "the square root of " if recipe.optimizer_kind in ROOTED else ""
    why = (
        f"the rate times {shown(factor)} = {shown(lr)}, {root}(1 + Bn/{recipe.batch_size})/"
        f"(1 + Bn/{batch_size}) with noise scale Bn = {shown(known(facts.noise_scale))}"
    )
    # Only a raised rate is capped, and never below the old one: that one was seen to be stable,
    # and a larger batch has the same mean step with less noise.
    if limit is not None and factor > 1 and lr > limit:
        lr = max(limit, recipe.lr)
        why += f", lowered to {shown(lr)} by the stability limit {shown(limit)}"
    return Change({"lr": lr}, why)


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
    validity="factors up to 32 both ways on small networks; upwards only with the curvature",
    preserves="distance from the best rate, momentum and betas per step",
    exact=False,
    needs=("noise_scale",),
    law=_noise_aware,
)
