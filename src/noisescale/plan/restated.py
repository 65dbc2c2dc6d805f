"""A recipe by one rule: what the rule sets, and what goes with it."""

from __future__ import annotations

from dataclasses import dataclass

from noisescale.records import Change, Recipe
from noisescale.theory.scaling import Facts, Rule, Scaled
from noisescale.theory.scaling.companions import clock_of, companions

_SET_BY_RULES = ("lr", "momentum", "dampening", "betas", "alpha", "eps")


@dataclass(frozen=True, kw_only=True)
class Restatement:
    """A whole recipe at the new batch size, by one rule and its companions."""

    rule: Rule
    recipe: Recipe
    changes: tuple[Change, ...]
    kept: tuple[Change, ...]
    warnings: tuple[str, ...]


def restate(recipe: Recipe, rule: Rule, scaled: Scaled, facts: Facts) -> Restatement:
    """Complete what a rule says of a recipe.

    Args:
        recipe: at the old batch size.
        rule: the rule.
        scaled: what it said.
        facts: what is known of the training.

    Returns:
        The whole recipe, and each key that was looked at.
    """
    rule = rule.of(recipe.optimizer_kind)
    clock = clock_of(rule, recipe, scaled.recipe, facts)
    others = companions(recipe, scaled.recipe, facts, clock)
    rows = [_batch_size(recipe, scaled.recipe), *_of_rule(recipe, rule, scaled), *others]
    return Restatement(
        rule=rule,
        recipe=scaled.recipe.with_changes(**{row.name: row.new for row in others}),
        changes=tuple(row for row in rows if row.old != row.new),
        kept=tuple(row for row in rows if row.old == row.new),
        warnings=tuple(scaled.warnings),
    )


def _batch_size(old: Recipe, new: Recipe) -> Change:
    return Change(
        name="batch_size", old=old.batch_size, new=new.batch_size, rule="given",
        source="asked for", validity="always", status="given",
        why=f"{old.unit} per optimizer step over all devices and passes",
    )  # fmt: skip


def _of_rule(recipe: Recipe, rule: Rule, scaled: Scaled) -> list[Change]:
    rows = []
    for name in _SET_BY_RULES:
        old, new = getattr(recipe, name, None), getattr(scaled.recipe, name, None)
        if old is None and new is None:
            continue
        rows.append(
            Change(
                name=name,
                old=old,
                new=new,
                rule=rule.name,
                source=rule.source,
                validity=rule.validity,
                status=rule.status,
                why=scaled.why if name == "lr" else f"keeps {rule.preserves}",
            )
        )
    return rows
