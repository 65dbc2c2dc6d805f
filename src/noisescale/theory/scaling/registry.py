"""The rules by name, and which of them is recommended when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from noisescale.errors import InvalidInputError, nearest
from noisescale.records import Recipe
from noisescale.theory.scaling.adam import ADAM_HALF_LIFE, ADAM_RATE_ONLY, ADAM_SDE, sde_refusal
from noisescale.theory.scaling.exact import EXACT, MOMENTUM_TRADE
from noisescale.theory.scaling.noise import ADASCALE, NOISE_AWARE, SURGE
from noisescale.theory.scaling.rates import KEEP_MOMENTUM, LINEAR, NONE, SQUARE_ROOT
from noisescale.theory.scaling.rule import Facts, Rule, Scaled

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            NOISE_AWARE,
            LINEAR,
            KEEP_MOMENTUM,
            EXACT,
            ADAM_HALF_LIFE,
            ADAM_SDE,
            ADAM_RATE_ONLY,
            SQUARE_ROOT,
            ADASCALE,
            SURGE,
            MOMENTUM_TRADE,
            NONE,
        )
    }
)

SYNONYMS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("linear", "momentum"): "keep-momentum",
        ("exact", "sgd"): "linear",
        ("exact", "adam"): "adam-half-life",
        ("exact", "rmsprop"): "adam-half-life",
        ("square-root", "adam"): "adam-rate-only",
        ("square-root", "rmsprop"): "adam-rate-only",
        ("square-root", "lion"): "adam-rate-only",
    }
)
"""For some kinds a rule says the same as another one."""


def rules_for(kind: str) -> tuple[Rule, ...]:
    """Return the rules that differ for a kind of optimizer; a synonym is left out.

    Args:
        kind: :attr:`~noisescale.records.Recipe.optimizer_kind`.
    """
    return tuple(
        rule
        for rule in RULES.values()
        if kind in rule.optimizers and (rule.name, kind) not in SYNONYMS
    )


def named(name: str, kind: str) -> Rule:
    """Return the rule that a user named, synonyms included.

    Args:
        name: of the rule.
        kind: of the optimizer.

    Raises:
        InvalidInputError: there is no such rule, or it is not for this kind of optimizer.
    """
    known = [rule.name for rule in RULES.values() if kind in rule.optimizers]
    if name not in RULES:
        raise InvalidInputError(f"rule {name!r}", "not a rule", nearest(name, known))
    if name not in known:
        raise InvalidInputError(
            f"rule {name!r} with {kind}",
            "not for this optimizer",
            f"choose from {', '.join(known)}",
        )
    return RULES[name]


def recommended(recipe: Recipe, batch_size: int, facts: Facts | None = None) -> Rule:
    """Return the rule to use.

    Args:
        recipe: at the old batch size.
        batch_size: the new one.
        facts: with a noise scale the noise-aware rule is chosen where there is one.
    """
    return RULES[_choice(recipe, batch_size, facts or Facts())[0]]


def why_recommended(recipe: Recipe, batch_size: int, facts: Facts | None = None) -> str:
    """Say in one sentence why :func:`recommended` chose so."""
    return _choice(recipe, batch_size, facts or Facts())[1]


def scale_or_fall_back(
    name: str, recipe: Recipe, batch_size: int, facts: Facts | None = None
) -> tuple[Rule, Scaled]:
    """Scale by a rule that nobody insists on: where adam-sde has no answer, by half-lives.

    Args:
        name: of the rule.
        recipe: at the old batch size.
        batch_size: the new one.
        facts: what is known besides.

    Returns:
        The rule that answered, and its answer, with a warning where it is another one.

    Raises:
        InvalidInputError: as :meth:`Rule.scale`, but for adam-sde beyond its range.
    """
    rule = named(name, recipe.optimizer_kind)
    refused = sde_refusal(recipe, batch_size) if rule is ADAM_SDE else None
    if refused is None:
        return rule, rule.scale(recipe, batch_size, facts)
    found = ADAM_HALF_LIFE.scale(recipe, batch_size, facts)
    warning = f"{refused}; the half-life form is used instead"
    return ADAM_HALF_LIFE, replace(found, warnings=(warning, *found.warnings))


def _choice(recipe: Recipe, batch_size: int, facts: Facts) -> tuple[str, str]:
    kind, down = recipe.optimizer_kind, batch_size < recipe.batch_size
    if batch_size == recipe.batch_size:
        return "none", "the global batch is the same"
    if facts.noise_scale is not None and kind in NOISE_AWARE.optimizers:
        return "noise-aware", "with a noise scale it failed least of all rules in both directions"
    if kind == "momentum" and batch_size > FARTHEST_LINEAR * recipe.batch_size:
        return "square-root", _FAR
    return _WITHOUT_NOISE_SCALE[kind][0 if down else 1]


FARTHEST_LINEAR = 8
"""Largest factor by which the rate of SGD with momentum is raised in proportion where no noise
scale is known. (measured: benchmarks/training_regret.py on digits and MNIST: up to it 23 of 24
conversions took at most 1.5 times the tuned steps, by 16 and 32 four of 16, and 8 did not arrive;
by the square root 11 of 16, and all arrived)"""

_TRADE = (
    "momentum-trade",
    "growing a batch by more momentum took fewer steps than the best rate without any did",
)
_LINEAR = ("linear", "without a noise scale nothing better is known downwards for plain SGD")
_KEPT = "momentum kept and the rate in proportion was the best both ways while the factor is small"
_FAR = "by this factor a rate in proportion failed, its square root did not"
_RATE = "the square root of the rate with averages kept did best where no noise scale is known"
_NORMALISED = "steps are divided by the size of the batch gradient, which noise sets"
_WITHOUT_NOISE_SCALE: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = MappingProxyType(
    {
        "sgd": (_LINEAR, _TRADE),
        "momentum": (("keep-momentum", _KEPT), ("keep-momentum", _KEPT)),
        "adam": (("adam-rate-only", _RATE), ("adam-rate-only", _RATE)),
        "rmsprop": (("adam-rate-only", _NORMALISED), ("adam-rate-only", _NORMALISED)),
        "lion": (("adam-rate-only", _NORMALISED), ("adam-rate-only", _NORMALISED)),
        "lars": (("square-root", _NORMALISED), ("square-root", _NORMALISED)),
        "lamb": (("square-root", _NORMALISED), ("square-root", _NORMALISED)),
    }
)
"""Per kind, downwards and upwards. (measured: benchmarks/training_regret.py, docs/lab-log.md; LARS,
LAMB, RMSProp and Lion: assumed from their neighbours)"""
