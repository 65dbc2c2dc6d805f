"""The learning rate along a run, by the step: for loops, what schedules say by position."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from noisescale.plan.schedule.of_recipe import rate_schedule
from noisescale.records import RateSchedule, Recipe


def rate_factor(recipe: Recipe, step: int) -> float:
    """Return what the recipe's rate is multiplied by at a step.

    During warm-up it is (step + 1) / (warmup_steps + 1); then what
    :func:`~noisescale.plan.schedule.of_recipe.rate_schedule` makes of the recipe's schedule.

    Args:
        recipe: its warm-up, ``schedule`` and length count, in steps or in examples.
        step: optimizer steps done before, from 0.

    Raises:
        InvalidInputError: the schedule is of no known kind or lacks a key.

    >>> rate_factor(Recipe(lr=1.0, batch_size=8, warmup_steps=4), 0)
    0.2
    """
    schedule, warmup = _schedule(_ByValue.of(recipe))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return schedule.at(step * recipe.batch_size)


def warmup_length(recipe: Recipe) -> int:
    """Return the steps of warm-up, from the steps or the examples of the recipe."""
    if recipe.warmup_steps is not None:
        return recipe.warmup_steps
    return round((recipe.warmup_examples or 0) / recipe.batch_size)


@dataclass(frozen=True)
class _ByValue:
    """A recipe that can be looked up by what its schedule depends on: its table cannot."""

    key: tuple[object, ...]
    recipe: Recipe = field(compare=False)

    @classmethod
    def of(cls, recipe: Recipe) -> _ByValue:
        counts = (recipe.warmup_steps, recipe.warmup_examples, recipe.total_steps)
        table = repr(recipe.schedule)
        return cls((recipe.batch_size, recipe.unit, *counts, recipe.total_examples, table), recipe)


# Loops ask at every step, and stacked ones for many recipes at once.
@functools.lru_cache(maxsize=4096)
def _schedule(recipe: _ByValue) -> tuple[RateSchedule, int]:
    of_one = recipe.recipe.with_changes(lr=1.0)
    return rate_schedule(of_one), warmup_length(of_one)
