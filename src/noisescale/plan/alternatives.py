"""What other rules say of the same conversion."""

from __future__ import annotations

import math
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.plan.restated import Restatement, restate
from noisescale.records import Alternative, Recipe
from noisescale.theory.scaling import Facts, Rule, rules_for

_CLOSE = 1e-12
"""Relative: rules that say the same by another formula differ by rounding. (assumed)"""


def alternatives(
    recipe: Recipe, chosen: Restatement, facts: Facts, best: Rule
) -> tuple[Alternative, ...]:
    """Say what the other rules for this optimizer would do.

    Args:
        recipe: at the old batch size.
        chosen: by the rule that was used.
        facts: what is known of the training.
        best: the recommended rule, which comes first where another was asked for.

    Returns:
        Rules that say something else, then those that could if more were known.
    """
    kind = recipe.optimizer_kind
    others = [rule.of(kind) for rule in rules_for(kind) if rule.name != chosen.rule.name]
    said = (_alternative(rule, recipe, chosen, facts) for rule in others)
    found = [one for one in said if one is not None]
    return tuple(sorted(found, key=lambda one: (one.rule != best.name, not one.values)))


def _alternative(
    rule: Rule, recipe: Recipe, chosen: Restatement, facts: Facts
) -> Alternative | None:
    needs = tuple(name for name in rule.needs if getattr(facts, name) is None)
    values: dict[str, Any] = {}
    when = f"when {rule.assumption}"
    if not needs:
        try:
            scaled = rule.scale(recipe, chosen.recipe.batch_size, facts)
            other = restate(recipe, rule, scaled, facts)
        except InvalidInputError as error:
            when = f"it has no answer here: {error.value}: {error.requirement}"
        else:
            values = differing(chosen.recipe, other.recipe)
            if not values:
                return None
    return Alternative(
        rule=rule.name,
        values=values,
        source=rule.source,
        status=rule.status,
        validity=rule.validity,
        preserves=rule.preserves,
        when=when,
        needs=needs,
    )


def differing(one: Recipe, other: Recipe) -> dict[str, Any]:
    """Return the keys that another recipe has otherwise, with its values.

    Args:
        one: a recipe.
        other: another one; what differs by rounding only is left out.
    """
    pairs = {name: (getattr(one, name), value) for name, value in vars(other).items()}
    return {name: new for name, (old, new) in pairs.items() if not alike(old, new)}


def alike(one: Any, other: Any) -> bool:
    """Whether two values of a recipe are the same but for rounding."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=_CLOSE)
    return bool(one == other)
