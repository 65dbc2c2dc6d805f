"""A recipe's warm-up and schedule, which count steps, as a rate by position."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from noisescale.errors import InvalidInputError, nearest
from noisescale.plan.schedule import rates
from noisescale.records import RateSchedule, Recipe


def rate_schedule(recipe: Recipe) -> RateSchedule:
    """Return a recipe's rate by position: at step s of the recipe, position s times its batch.

    Trainings run it as it is here. Kinds: ``constant``, ``step`` (``milestones``, ``gamma``
    0.1), ``cosine`` (``floor`` 0), ``linear`` (``floor``), ``warmup_stable_decay``
    (``decay_steps``, ``floor``, ``shape``) and ``list`` (``points``: pairs of a step and a factor
    of the rate). Warm-up is linear from lr / (steps + 1). Counts with a fraction, as a recipe
    restated from another batch size has them, are rounded to whole steps.

    Args:
        recipe: its rate, batch size, warm-up, ``schedule`` and length count.

    Raises:
        InvalidInputError: the schedule is of no known kind, or lacks a key.

    >>> recipe = Recipe(lr=1.0, batch_size=8, schedule={"kind": "step", "milestones": [10]})
    >>> rate_schedule(recipe).at(80)
    0.1
    """
    table = recipe.schedule or {"kind": "constant"}
    kind = str(table.get("kind"))
    if kind not in _KINDS:
        raise InvalidInputError(
            f"schedule kind {table.get('kind')!r}", "not a schedule", nearest(kind, _KINDS)
        )
    for key in table:
        if key not in ("kind", *_KEYS[kind]):
            raise InvalidInputError(
                f"schedule key {key!r}",
                f"not a key of {kind!r}",
                nearest(str(key), _KEYS[kind]) if _KEYS[kind] else "remove it",
            )
    return _KINDS[kind](recipe, table)


def length(recipe: Recipe) -> int | None:
    """Return a recipe's length in its unit; None where it has none."""
    if recipe.total_steps is not None:
        return recipe.total_steps * recipe.batch_size
    return recipe.total_examples


def _warmup(recipe: Recipe) -> dict[str, Any]:
    # In whole steps of the recipe, as the engine does it.
    steps = recipe.warmup_steps
    if steps is None:
        steps = round((recipe.warmup_examples or 0) / recipe.batch_size)
    return {
        "warmup": steps * recipe.batch_size,
        "warmup_from": 1 / (steps + 1),
        "unit": recipe.unit,
    }


def _constant(recipe: Recipe, _: dict[str, Any]) -> RateSchedule:
    return rates.constant(recipe.lr, **_warmup(recipe))


def _step(recipe: Recipe, table: dict[str, Any]) -> RateSchedule:
    milestones = table.get("milestones")
    if not milestones or not isinstance(milestones, list | tuple):
        raise _lacks("step", "milestones in steps", "milestones = [100, 200]")
    return rates.step(
        recipe.lr,
        milestones=[_position(recipe, "milestone", value) for value in milestones],
        gamma=_number(table, "gamma", 0.1),
        **_warmup(recipe),
    )


def _falling(
    fall: Callable[..., RateSchedule],
) -> Callable[[Recipe, dict[str, Any]], RateSchedule]:
    def schedule(recipe: Recipe, table: dict[str, Any]) -> RateSchedule:
        warmup = _warmup(recipe)
        # At least one step long, as the engine has it.
        total = max(_total(recipe, str(table["kind"])), warmup["warmup"] + recipe.batch_size)
        return fall(recipe.lr, total=total, floor=_number(table, "floor", 0.0), **warmup)

    return schedule


def _stable(recipe: Recipe, table: dict[str, Any]) -> RateSchedule:
    if table.get("decay_steps") is None:
        raise _lacks("warmup_stable_decay", "length of its fall in steps", "decay_steps = 100")
    total, warmup = _total(recipe, "warmup_stable_decay"), _warmup(recipe)
    decay = _position(recipe, "decay_steps", table["decay_steps"])
    over = warmup["warmup"] + decay - total
    if recipe.total_steps is None and 0 < over <= 2 * recipe.batch_size < decay:
        decay -= over  # each of the three was rounded to whole steps
    return rates.warmup_stable_decay(
        recipe.lr,
        total=total,
        decay=decay,
        floor=_number(table, "floor", 0.0),
        shape=table.get("shape", "linear"),
        **warmup,
    )


def _listed(recipe: Recipe, table: dict[str, Any]) -> RateSchedule:
    points = table.get("points")
    try:
        pairs = [(_position(recipe, "point", at), float(factor)) for at, factor in points or ()]
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidInputError):
            raise
        pairs = []
    if not pairs:
        raise _lacks("list", "points, pairs of a step and a factor", "points = [[0, 1], [90, 0.1]]")
    if _warmup(recipe)["warmup"]:
        raise InvalidInputError(
            "a warm-up beside schedule 'list'", "the list says the whole rate", "remove one"
        )
    rates_at = [
        (at, factor * recipe.lr)
        for (at, factor), (following, _) in itertools.pairwise([*pairs, (-1, 0.0)])
        if at != following  # two points that round to one step: the later one holds
    ]
    return rates.listed(rates_at, unit=recipe.unit)


_KINDS: dict[str, Callable[[Recipe, dict[str, Any]], RateSchedule]] = {
    "constant": _constant,
    "step": _step,
    "cosine": _falling(rates.cosine),
    "linear": _falling(rates.linear),
    "warmup_stable_decay": _stable,
    "list": _listed,
}
_KEYS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "step": ("milestones", "gamma"),
    "cosine": ("floor",),
    "linear": ("floor",),
    "warmup_stable_decay": ("decay_steps", "floor", "shape"),
    "list": ("points",),
}


def _total(recipe: Recipe, kind: str) -> int:
    total = length(recipe)
    if total is None:
        raise InvalidInputError(
            f"schedule {kind!r}", "the length of the training is required", "give total_steps"
        )
    # Whole steps of the recipe, as the engine does it.
    return max(1, total // recipe.batch_size) * recipe.batch_size


def _position(recipe: Recipe, name: str, steps: Any) -> int:
    number = isinstance(steps, int | float) and not isinstance(steps, bool)
    if not number or not 0 <= steps < math.inf:
        raise InvalidInputError(
            f"{name} {steps!r}", "a number of steps is required", f"change {name}"
        )
    # In whole steps: a recipe restated from another batch size has fractions of them.
    whole: int = round(steps)
    return whole * recipe.batch_size


def _number(table: dict[str, Any], key: str, default: float) -> float:
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise InvalidInputError(f"{key} {value!r}", "a number is required", f"change {key}")
    return float(value)


def _lacks(kind: str, what: str, example: str) -> InvalidInputError:
    return InvalidInputError(f"schedule {kind!r}", f"its {what} are required", f"give {example}")
