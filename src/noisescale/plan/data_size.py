"""A recipe for training data of another size, before its batch size is restated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.plan.alternatives import differing
from noisescale.plan.contradictions import LARGEST
from noisescale.plan.whole_numbers import whole_number
from noisescale.records import Alternative, Change, DataConversion, Recipe
from noisescale.theory.scaling.data_size import (
    DATA_RULES,
    LARGEST_CHECKED,
    DataRule,
    data_rule,
    for_data,
)

_SURE = ("given", "paper", "measured", "assumed")
"""How sure a rule is; of two that set one key, the later counts."""


@dataclass(frozen=True, kw_only=True)
class DataStage:
    """A recipe for data of another size, at the old batch size."""

    rule: DataRule
    original: Recipe
    recipe: Recipe
    rows: tuple[Change, ...]


def data_stage(
    recipe: Recipe, new_dataset_size: Any, rule: str | None, where: str
) -> DataStage | None:
    """Restate a recipe for training data of another size.

    Args:
        recipe: with its ``dataset_size``.
        new_dataset_size: training examples of the new run; None where nobody asked.
        rule: name of the rule for the rate; the recommended one by default.
        where: how the recipe is called in errors.

    Returns:
        The recipe at its batch size; None where the data are the same.

    Raises:
        InvalidInputError: the size cannot be used, the old one is not known, there is no such
            rule, or none for this optimizer.
    """
    if new_dataset_size is None:
        if rule is not None:
            raise InvalidInputError(
                f"data rule {rule!r}", "the new data-set size is required", "give new_dataset_size"
            )
        return None
    size = whole_number(
        new_dataset_size,
        "new_dataset_size",
        most=LARGEST,
        remedy="give the training examples of the new run",
    )
    if recipe.dataset_size is None:
        raise InvalidInputError(
            f"{where}: dataset_size",
            "it is missing, and a new data-set size needs the old one",
            "give the training examples of the old run (--dataset-size N)",
        )
    chosen = data_rule(rule, recipe)
    return None if size == recipe.dataset_size else _stage(recipe, size, chosen)


def _stage(recipe: Recipe, size: int, rule: DataRule) -> DataStage:
    rows = for_data(recipe, size, rule)
    new = recipe.with_changes(**{row.name: row.new for row in rows})
    return DataStage(rule=rule, original=recipe, recipe=new, rows=rows)


def joined(data: Iterable[Change], batch: Iterable[Change]) -> tuple[Change, ...]:
    """Make one row of what data and batch size, in turn, do to a key.

    Args:
        data: rows of the data's stage.
        batch: rows of the batch's stage, which began where the data's ended.

    Returns:
        A row for each key, old value to new one; the batch size, the data, then the others.
    """
    first = {row.name: row for row in data}
    then = {row.name: row for row in batch}
    names = dict.fromkeys((*(n for n in ("batch_size",) if n in then), *first, *then))
    return tuple(_both(first.get(name), then.get(name)) for name in names)


def _both(data: Change | None, batch: Change | None) -> Change:
    if data is None or batch is None:
        row = data or batch
        assert row is not None
        return row
    if data.old == data.new:
        return batch
    if batch.old == batch.new:
        return data
    counts = batch.source == data.source == "arithmetic"  # in examples each, in epochs together
    return Change(
        name=data.name,
        old=data.old,
        new=batch.new,
        rule=data.rule if counts else f"{batch.rule}, {data.rule}",
        source=f"{batch.source}; {data.source}" if batch.source != data.source else data.source,
        validity=f"for the batch, {batch.validity}; for the data, {data.validity}",
        why=f"for the data, {data.why}; then for the batch, {batch.why}",
        status=max(data.status, batch.status, key=_SURE.index),
    )


def data_conversion(
    stage: DataStage, new: Recipe, by: Callable[[Recipe], Recipe]
) -> DataConversion:
    """Tell of a stage: its rule, and what the other one says of the whole recipe.

    Args:
        stage: the data's.
        new: the recipe at the new batch size.
        by: from a recipe for the new data to that recipe at the new batch size.
    """
    old, size, kind = stage.original, stage.recipe.dataset_size, stage.original.optimizer_kind
    assert old.dataset_size is not None
    assert size is not None
    best, *_ = DATA_RULES
    others = [rule.of(kind) for rule in DATA_RULES.values() if rule.name != stage.rule.name]
    return DataConversion(
        old_dataset_size=old.dataset_size,
        new_dataset_size=size,
        rule=stage.rule.name,
        recommended=best,
        why=_why(stage.rule.name, best),
        source=stage.rule.source,
        status=stage.rule.status,
        assumption=stage.rule.assumption,
        validity=stage.rule.validity,
        preserves=stage.rule.preserves,
        alternatives=tuple(
            _alternative(rule, new, by(_stage(old, size, rule).recipe)) for rule in others
        ),
    )


def _why(used: str, best: str) -> str:
    asked = "recommended: " if used == best else f"asked for; recommended is {best}: "
    return (
        f"{asked}early in training the best rate does not depend on how many examples there are,"
        " and a rate that falls along the run is small at its end whatever the data"
    )


def _alternative(rule: DataRule, new: Recipe, other: Recipe) -> Alternative:
    return Alternative(
        rule=rule.name,
        values=differing(new, other),
        source=rule.source,
        status=rule.status,
        validity=rule.validity,
        preserves=rule.preserves,
        when=f"when {rule.assumption}",
    )


def data_warnings(stage: DataStage) -> list[str]:
    """Say what may go wrong with data of another size.

    Args:
        stage: the data's.
    """
    ratio = _ratio(stage)
    found = []
    if (factor := max(ratio, 1 / ratio)) > LARGEST_CHECKED:
        found.append(
            f"the data change by a factor of {factor:.4g}, more than the"
            f" {LARGEST_CHECKED} over which a rate was seen to stay: check it by short runs at a"
            " third and three times it"
        )
    return found


def data_notes(stage: DataStage, new: Recipe) -> tuple[str, ...]:
    """Say what the new length costs, and what would keep the cost.

    Args:
        stage: the data's.
        new: the recipe at the new batch size.
    """
    ratio, unit = _ratio(stage), stage.original.unit
    for name in ("total_steps", "total_examples"):
        length = getattr(new, name)
        if length is not None:
            return (
                f"as many epochs as before are {ratio:.4g} times the {unit}: for as many {unit} as"
                f" before take {1 / ratio:.4g} times the epochs, {name}"
                f" {max(1, round(length / ratio)):,}",
            )
    return ()


def _ratio(stage: DataStage) -> float:
    old, new = stage.original.dataset_size, stage.recipe.dataset_size
    assert old is not None
    assert new is not None
    return new / old
