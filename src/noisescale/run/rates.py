"""The learning rate along a run: linear warm-up, then the recipe's schedule."""

from __future__ import annotations

import math

from noisescale.errors import InvalidInputError, nearest
from noisescale.records import Recipe

SCHEDULES = ("constant", "cosine", "step")


def rate_factor(recipe: Recipe, step: int) -> float:
    """Return what the recipe's rate is multiplied by at a step.

    During warm-up it is (step + 1) / (warmup_steps + 1). Then ``constant`` is 1; ``cosine`` is
    (1 + cos(pi x)) / 2 with x the share done of the steps after warm-up, down to
    ``schedule.floor`` (0); ``step`` is gamma (0.1) to the number of ``milestones`` passed.

    Args:
        recipe: its warm-up, ``schedule`` and length count, in steps or in examples.
        step: optimizer steps done before, from 0.

    Raises:
        InvalidInputError: the schedule is of no known kind or lacks a key.

    >>> rate_factor(Recipe(lr=1.0, batch_size=8, warmup_steps=4), 0)
    0.2
    """
    warmup = warmup_length(recipe)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    schedule = recipe.schedule or {"kind": "constant"}
    kind = schedule.get("kind")
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        return _cosine(recipe, step - warmup)
    if kind == "step":
        return _steps(recipe, step)
    raise InvalidInputError(
        f"schedule kind {kind!r}", "a schedule that can be run is required",
        nearest(str(kind), SCHEDULES),
    )  # fmt: skip


def warmup_length(recipe: Recipe) -> int:
    """Return the steps of warm-up, from the steps or the examples of the recipe."""
    if recipe.warmup_steps is not None:
        return recipe.warmup_steps
    return round((recipe.warmup_examples or 0) / recipe.batch_size)


def _cosine(recipe: Recipe, done: int) -> float:
    schedule = recipe.schedule or {}
    total = recipe.total_steps
    if total is None and recipe.total_examples is not None:
        total = recipe.total_examples // recipe.batch_size
    if total is None:
        raise InvalidInputError(
            "schedule 'cosine'", "the length of the training is required", "give total_steps"
        )
    length = max(1, total - warmup_length(recipe))
    floor = float(schedule.get("floor", 0.0))
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, done / length))) / 2


def _steps(recipe: Recipe, step: int) -> float:
    schedule = recipe.schedule or {}
    milestones = schedule.get("milestones")
    if not milestones:
        raise InvalidInputError(
            "schedule 'step'", "its milestones in steps are required",
            "give milestones = [100, 200]",
        )  # fmt: skip
    gamma = float(schedule.get("gamma", 0.1))
    return float(gamma ** sum(step >= round(milestone) for milestone in milestones))
