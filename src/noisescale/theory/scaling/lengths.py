"""Counts of steps that follow the batch size: warm-up, length, schedule, cadence.

Keys in steps are rounded to whole steps here, since this is what is printed and written;
:class:`~noisescale.theory.per_example.PerExample` keeps them exactly.
"""

from __future__ import annotations

import math

from noisescale.records import Change, Recipe
from noisescale.theory.per_example import ADAM_BETAS, RMSPROP_ALPHA
from noisescale.theory.scaling.rule import shown
from noisescale.theory.schedule_counts import COUNTS, recounted

FEWEST = 20
"""Steps of warm-up below which none is shortened. (measured: with 1.25 steps in place of 20 a
training took 171 steps to its goal in place of 94)"""

UNTUNED = 2.0
"""Steps of warm-up that Adam needs, times 1 - beta2. (paper: Ma and Yarats 2019,
arXiv:1910.04209, sec. 5)"""

LARGEST_SHARE = 0.1
"""Share of the training that the fewest steps of warm-up may take. (assumed)"""

_GOYAL = "Goyal et al. 2017 (arXiv:1706.02677), sec. 2.2"
_FEWEST_SOURCE = (
    f"{_GOYAL}; fewest steps: You et al. 2020 (arXiv:1904.00962), sec. 4, Ma and Yarats 2019"
    " (arXiv:1910.04209), sec. 5"
)


def fewest_warmup_steps(recipe: Recipe) -> float:
    """Return the steps of warm-up that a recipe needs at any batch size.

    2/(1 - beta2) for Adam, AdamW and LAMB (alpha for RMSProp), the memory 2/(1 - m) of a
    velocity, and never below :data:`FEWEST`.

    Args:
        recipe: its optimizer and averages are used.

    Source: Ma and Yarats 2019 (arXiv:1910.04209), sec. 5; the velocity: assumed alike.

    >>> fewest_warmup_steps(Recipe(optimizer="adamw", lr=1e-3, batch_size=8, betas=(0.9, 0.75)))
    20.0
    >>> round(fewest_warmup_steps(Recipe(lr=0.1, batch_size=8, momentum=0.98)))
    100
    """
    kept = 0.0
    if recipe.optimizer_kind in ("adam", "lamb"):
        kept = (recipe.betas or ADAM_BETAS)[1]
    elif recipe.optimizer == "rmsprop":
        kept = RMSPROP_ALPHA if recipe.alpha is None else recipe.alpha
    elif recipe.optimizer in ("sgd", "lars"):
        kept = recipe.momentum or 0.0
    return max(float(FEWEST), UNTUNED / (1 - kept))


def warmup(old: Recipe, new: Recipe, clock: float) -> tuple[Change, ...]:
    """Keep the warm-up in examples, but not below a number of steps.

    steps' = max(steps/clock, min(steps, fewest, a tenth of the training)).

    Args:
        old: the recipe before.
        new: the one that the rate's rule made.
        clock: old steps that a new one counts for.
    """
    if old.warmup_steps is None and old.warmup_examples is None:
        return ()
    before = _steps(old.warmup_steps, old.warmup_examples, old.batch_size)
    after, least = before / clock, _least(old, new, before, clock)
    raised = least > after * (1 + 1e-12)
    steps = least if raised else after
    why = (
        f"the same {old.unit} would be {shown(after)} of the old {shown(before)} steps, too few:"
        f" {_needs(new)}; {math.ceil(steps)} stay"
        if raised
        else f"the warm-up ends after {_before(old, new, clock)}"
    )
    return _counted(
        "warmup", old, new, steps, why, rule="warm-up-in-examples",
        source=_FEWEST_SOURCE if raised else _GOYAL, status="measured" if raised else "paper",
        validity="a linear warm-up; any batch size",
    )  # fmt: skip


def length(old: Recipe, new: Recipe, clock: float) -> tuple[Change, ...]:
    """Keep the length of the training in examples, or in AdaScale's steps.

    Args:
        old: the recipe before.
        new: its batch size is used.
        clock: old steps that a new one counts for.
    """
    if old.total_steps is None and old.total_examples is None:
        return ()
    steps = _steps(old.total_steps, old.total_examples, old.batch_size) / clock
    return _counted(
        "total", old, new, steps, f"the training takes {_before(old, new, clock)}",
        rule="length-in-examples", source="arithmetic", status="paper",
        validity="batch sizes below the critical one; above it a batch needs more examples",
    )  # fmt: skip


def schedule(old: Recipe, new: Recipe, clock: float) -> tuple[Change, ...]:
    """Keep a schedule's counts in examples, or in AdaScale's steps.

    Args:
        old: the recipe before.
        new: its batch size is used.
        clock: old steps that a new one counts for.

    Raises:
        InvalidInputError: a count of the schedule is none.
    """
    table = recounted(old.schedule, lambda steps: max(round(steps / clock), min(1, round(steps))))
    if old.schedule is None or table is None:
        return ()
    counts = any(key in table for key in COUNTS)
    why = f"its counts come after {_before(old, new, clock)}" if counts else "it counts no steps"
    room, fall = _after_warmup(old, new, clock), table.get("decay_steps")
    if fall is not None and room is not None and fall > room >= 1 and _fits(old):
        # A warm-up that keeps its fewest steps, or rounding, takes some of the fall's.
        table["decay_steps"] = room
        why += ", and its fall begins where the warm-up ends"
    return (
        Change(
            name="schedule", old=old.schedule, new=table, rule="schedule-in-examples",
            source="arithmetic", status="paper", validity="any batch size",
            why=why,
        ),
    )  # fmt: skip


def cadence(old: Recipe, new: Recipe) -> tuple[Change, ...]:
    """Keep the examples between two evaluations, to whole steps and at least one.

    Args:
        old: the recipe before.
        new: its batch size is used.
    """
    if old.evaluate_every is None:
        return ()
    exact = old.evaluate_every * old.batch_size / new.batch_size
    steps = max(1, round(exact))
    why = f"{shown(steps * new.batch_size)} {old.unit} between evaluations, as near as whole steps"
    return (
        Change(
            name="evaluate_every", old=old.evaluate_every, new=steps, rule="cadence-in-examples",
            source="arithmetic", status="paper", validity="any batch size", why=why,
        ),
    )  # fmt: skip


def _needs(recipe: Recipe) -> str:
    fewest = fewest_warmup_steps(recipe)
    who = "a warm-up needs" if fewest == FEWEST else "the optimizer's averages need"
    return f"{who} {shown(fewest)}"


def _after_warmup(old: Recipe, new: Recipe, clock: float) -> int | None:
    """Return the new steps that are left after the new warm-up; None where no length is known."""
    rows = (*warmup(old, new, clock), *length(old, new, clock))
    return _left(new.with_changes(**{row.name: row.new for row in rows}))


def _fits(recipe: Recipe) -> bool:
    left = _left(recipe)
    return left is not None and (recipe.schedule or {}).get("decay_steps", 0) <= left


def _left(recipe: Recipe) -> int | None:
    total = recipe.total_steps
    if total is None and recipe.total_examples is not None:
        total = recipe.total_examples // recipe.batch_size
    if total is None:
        return None
    warm = recipe.warmup_steps
    return total - (
        round((recipe.warmup_examples or 0) / recipe.batch_size) if warm is None else warm
    )


def _least(old: Recipe, new: Recipe, before: float, clock: float) -> float:
    least = min(before, fewest_warmup_steps(new))
    if old.total_steps is None and old.total_examples is None:
        return least
    total = _steps(old.total_steps, old.total_examples, old.batch_size) / clock
    return min(least, LARGEST_SHARE * total)


def _counted(
    what: str, old: Recipe, new: Recipe, steps: float, why: str, **conditions: str
) -> tuple[Change, ...]:
    """Give a number of steps under the keys that the recipe has it under."""
    found = []
    for key in (f"{what}_steps", f"{what}_examples"):
        before = getattr(old, key)
        if before is not None:
            exact = steps if key.endswith("steps") else steps * new.batch_size
            # Whole examples: up, so that the fewest steps are not rounded away again.
            value = round(exact) if key.endswith("steps") else math.ceil(exact * (1 - 1e-12))
            found.append(Change(name=key, old=before, new=max(1, value), why=why, **conditions))
    return tuple(found)


def _steps(steps: int | None, examples: int | None, batch_size: int) -> float:
    return float(steps) if steps is not None else (examples or 0) / batch_size


def _before(old: Recipe, new: Recipe, clock: float) -> str:
    if math.isclose(clock, new.batch_size / old.batch_size):
        return f"as many {old.unit} as before"
    return f"as many steps as before, each now worth {shown(clock)} of them by its gain"
