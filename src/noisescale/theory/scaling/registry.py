"""The rules by name, and which of them is recommended when."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from noisescale.errors import InvalidInputError, nearest
from noisescale.records import Recipe
from noisescale.theory.scaling.exact import EXACT
from noisescale.theory.scaling.noise import NOISE_AWARE
from noisescale.theory.scaling.rates import KEEP_MOMENTUM, LINEAR, NONE, SQUARE_ROOT
from noisescale.theory.scaling.rule import Facts, Rule, Scaled

RULES: Mapping[str, Rule] = MappingProxyType(
    {rule.name: rule for rule in (NOISE_AWARE, LINEAR, KEEP_MOMENTUM, EXACT, SQUARE_ROOT, NONE)}
)

SYNONYMS: Mapping[tuple[str, str], str] = MappingProxyType(
    {("linear", "momentum"): "keep-momentum"}
)
"""For some kinds a general rule is the same as one with a name of its own."""


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
    """Scale by a rule."""
    rule = named(name, recipe.optimizer_kind)
    return rule, rule.scale(recipe, batch_size, facts)


def _choice(recipe: Recipe, batch_size: int, facts: Facts) -> tuple[str, str]:
    kind = recipe.optimizer_kind
    if batch_size == recipe.batch_size:
        return "none", "the global batch is the same"
    if facts.noise_scale is not None and kind in NOISE_AWARE.optimizers:
        return "noise-aware", "with a noise scale it failed least of all rules in both directions"
    if kind == "sgd":
        return "linear", "without a noise scale nothing better is known for plain SGD"
    if kind == "momentum":
        if batch_size < recipe.batch_size:
            return "exact", "downwards it keeps the training in examples"
        return "keep-momentum", "upwards the exact restatement leaves stability"
    return "square-root", "steps are divided by the size of the batch gradient"
