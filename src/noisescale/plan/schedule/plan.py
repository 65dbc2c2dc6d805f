"""From a recipe to a planned schedule of batch sizes and rates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from noisescale.errors import InvalidInputError, nearest
from noisescale.plan.schedule.growth import grow as grow_batch
from noisescale.plan.schedule.limits import (
    Limit,
    check_sizes,
    growth_limit,
    growth_sizes,
    tolerance,
)
from noisescale.plan.schedule.of_recipe import length, rate_schedule
from noisescale.plan.schedule.rows import schedule_rows
from noisescale.plan.schedule.text import in_unit, parse_schedule, spell_schedule
from noisescale.plan.schedule.warm_up import begin_small, ramp
from noisescale.plan.schedule.warnings import instability, warnings_of
from noisescale.records import BatchPiece, BatchSchedule, Recipe, SchedulePlan
from noisescale.records.schedule import COUPLINGS
from noisescale.theory.per_example import SQUARE_ROOT

RULES = {
    ("linear", False): (
        "the plan keeps the lr / ((1 - m) B) of the recipe at every step",
        "Smith, Kindermans, Ying and Le 2018 (arXiv:1711.00489)",
    ),
    ("linear", True): (
        "the plan keeps the lr / B of the recipe at every step",
        "Goyal et al. 2017 (arXiv:1706.02677), sec. 2.1, there for SGD",
    ),
    ("square_root", False): (
        "the plan keeps the lr / sqrt(B) of the recipe at every step",
        "Hoffer et al. 2017 (arXiv:1705.08741), sec. 4",
    ),
    ("square_root", True): (
        "the plan keeps the lr / sqrt(B) of the recipe at every step",
        "Malladi et al. 2022 (arXiv:2205.10287), sec. 5",
    ),
}
"""What a coupling keeps, and its source, by whether steps are divided by the gradient's size."""


def plan_schedule(
    recipe: Recipe,
    *,
    grow: bool = False,
    text: str | None = None,
    unit: str | None = None,
    threshold_unit: str | None = None,
    size_unit: str | None = None,
    sequence_length: int | None = None,
    warmup_batch: Sequence[int] | None = None,
    max_batch_size: int | None = None,
    critical_batch: float | None = None,
    curvature: float | None = None,
    dataset_size: int | None = None,
    micro_batch_size: int | None = None,
    replicas: int | None = None,
    multiple_of: int | None = None,
    powers: bool = False,
    growth_factor: float = 2.0,
    coupling: str = "auto",
) -> SchedulePlan:
    """Plan batch sizes and rates along a training.

    ``grow`` lets the batch grow where the recipe's rate would fall; ``text`` takes sizes as given;
    ``warmup_batch`` begins with a small batch. Without any, the recipe's own schedule is shown.

    Args:
        recipe: the training at one batch size, with its length and its rate schedule.
        grow: grow the batch instead of decaying the rate.
        text: sizes as "0:768 250B:1536"; its units must be declared.
        unit: what thresholds and sizes of ``text`` count.
        threshold_unit: what thresholds count, where it is not ``unit``.
        size_unit: what sizes count, where it is not ``unit``.
        sequence_length: tokens per sequence; the recipe's by default.
        warmup_batch: first size, length and, if sizes shall not double, increment; in the
            recipe's unit.
        max_batch_size: limit of growth; replaces the tenth of the data set.
        critical_batch: limit of growth besides.
        curvature: largest eigenvalue of the Hessian (an upper quantile along the run): growth
            stops where the rate would leave stability; SGD's.
        dataset_size: training examples; the recipe's by default.
        micro_batch_size: per pass and device; sizes are multiples of it times ``replicas``.
        replicas: devices that average their gradients.
        multiple_of: what sizes must divide by besides.
        powers: grow to the recipe's batch size times powers of two only.
        growth_factor: ratio of neighbouring sizes where the rate falls continuously.
        coupling: of the rate to the batch size: ``linear``, ``square_root``, ``none``, or
            ``auto``: the square root for Adam and LAMB, else linear.

    Returns:
        The plan, row by row, with what it saves.

    Raises:
        InvalidInputError: the recipe has no length, a value is out of its range, units are not
            declared or mixed, sizes do not divide or exceed the data, or options contradict.

    Source: ``plan.schedule.growth``, ``plan.schedule.warm_up``.

    >>> recipe = Recipe(lr=0.1, batch_size=128, total_steps=400, dataset_size=50_000,
    ...                 schedule={"kind": "step", "milestones": [200, 300], "gamma": 0.2})
    >>> plan = plan_schedule(recipe, grow=True)
    >>> plan.text, plan.updates
    ('0:128 25600:640 38400:3200', 224)
    """
    _refuse_contradictions(grow, text, warmup_batch, max_batch_size, critical_batch, powers)
    if text is None:
        _refuse_units(unit=unit, threshold_unit=threshold_unit, size_unit=size_unit)
    recipe = _completed(recipe, dataset_size=dataset_size, sequence_length=sequence_length)
    share = _count("micro_batch_size", micro_batch_size) * _count("replicas", replicas)
    multiple = math.lcm(share, _count("multiple_of", multiple_of))
    limit = None
    if grow:
        limit = growth_limit(recipe, max_batch_size=max_batch_size, critical_batch=critical_batch)
    schedule = _constant(recipe, _coupling(recipe, coupling))
    if text is not None:
        given = parse_schedule(
            text,
            unit=unit,
            threshold_unit=threshold_unit,
            size_unit=size_unit,
            sequence_length=recipe.sequence_length,
        )
        given = in_unit(given, recipe.unit, sequence_length=recipe.sequence_length)
        schedule = dataclasses.replace(schedule, pieces=given.pieces)
    elif limit is not None:
        sizes = growth_sizes(recipe, limit, multiple_of=multiple, powers=powers)
        limit = limit.among(sizes)
        schedule = grow_batch(
            rate_schedule(recipe),
            batch_size=recipe.batch_size,
            coupling=schedule.coupling,
            total=schedule.total,
            sizes=sizes,
            growth_factor=growth_factor,
            tolerates=tolerance(recipe, curvature),
        )
    if warmup_batch is not None:
        schedule = _begun_small(schedule, recipe, warmup_batch, multiple)
    check_sizes(schedule, recipe, multiple_of=multiple)
    plan = _plan(recipe, schedule, limit, share if micro_batch_size is not None else None)
    unstable = instability(recipe, curvature, schedule, plan.rows)
    return dataclasses.replace(plan, warnings=(*plan.warnings, *unstable))


def _plan(
    recipe: Recipe, schedule: BatchSchedule, limit: Limit | None, share: int | None
) -> SchedulePlan:
    rows = schedule_rows(schedule, recipe, share=share)
    updates = schedule.updates()
    before = -(-(schedule.total or 0) // recipe.batch_size)
    normalised = recipe.optimizer_kind in SQUARE_ROOT
    unmoved = ("the rate is the recipe's whatever the batch size", "none")
    rule, source = RULES.get((schedule.coupling, normalised), unmoved)
    return SchedulePlan(
        recipe=recipe,
        schedule=schedule,
        rows=rows,
        updates=updates,
        original_updates=before,
        updates_saved=1 - updates / before,
        limit=limit.size if limit is not None else None,
        limit_source=limit.source if limit is not None else "",
        text=spell_schedule(schedule),
        rule=rule,
        source=source,
        warnings=warnings_of(schedule, recipe, rows, limit),
    )


def _constant(recipe: Recipe, coupling: str) -> BatchSchedule:
    total = length(recipe)
    if not total:
        raise InvalidInputError(
            "a recipe without a length", "the length of the training is required",
            "give total_examples or total_steps",
        )  # fmt: skip
    return BatchSchedule(
        pieces=(BatchPiece(start=0, batch_size=recipe.batch_size),),
        unit=recipe.unit,
        rate=rate_schedule(recipe),
        reference_batch_size=recipe.batch_size,
        coupling=coupling,
        total=total,
    )


def _begun_small(
    schedule: BatchSchedule, recipe: Recipe, warmup_batch: Sequence[int], multiple: int
) -> BatchSchedule:
    if len(warmup_batch) not in (2, 3):
        raise InvalidInputError(
            f"warmup_batch {tuple(warmup_batch)}", "a first size and a length are required",
            "give (256, 1000000)",
        )  # fmt: skip
    names = ("first size", "length", "increment")
    start, until, *rest = (
        _count(f"{name} of the batch warm-up", value)
        for name, value in zip(names, warmup_batch, strict=False)
    )
    pieces = ramp(
        start=start,
        end=recipe.batch_size,
        length=until,
        increment=rest[0] if rest else None,
        multiple_of=multiple,
    )
    return begin_small(schedule, pieces)


def _coupling(recipe: Recipe, coupling: str) -> str:
    if coupling == "auto":
        return "square_root" if recipe.optimizer_kind in SQUARE_ROOT else "linear"
    if coupling not in COUPLINGS:
        raise InvalidInputError(
            f"coupling {coupling!r}", "not a coupling of the rate to the batch size",
            nearest(str(coupling), ("auto", *COUPLINGS)),
        )  # fmt: skip
    return coupling


def _completed(recipe: Recipe, **given: int | None) -> Recipe:
    """Add what was given beside the recipe; what contradicts it is refused."""
    for name, value in given.items():
        old: Any = getattr(recipe, name)
        if None not in (value, old) and value != old:
            raise InvalidInputError(
                f"{name} {value}", f"contradicts the recipe's {name} {old}", "give one of them"
            )
    return recipe.with_changes(**{k: v for k, v in given.items() if v is not None})


def _refuse_contradictions(
    grow: bool,
    text: str | None,
    warmup_batch: Sequence[int] | None,
    max_batch_size: int | None,
    critical_batch: float | None,
    powers: bool,
) -> None:
    if text is not None and (grow or warmup_batch is not None):
        other = "grow" if grow else "warmup_batch"
        raise InvalidInputError(
            f"text {text!r} beside {other}", "the text says all sizes", "give one of them"
        )
    limits = {"max_batch_size": max_batch_size, "critical_batch": critical_batch}
    limits["powers"] = powers or None
    for name, value in limits.items():
        if value is not None and not grow:
            raise InvalidInputError(f"{name} {value}", "it limits the growth", "add grow")


def _refuse_units(**units: str | None) -> None:
    for name, unit in units.items():
        if unit is not None:
            raise InvalidInputError(
                f"{name} {unit} without a text",
                "it says what the numbers of text count, and there are none",
                "leave it out: all else counts the recipe's unit",
            )


def _count(name: str, value: Any) -> int:
    """Return a count of at least 1; 1 where it is not given."""
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(
            f"{name} {value!r}", "a whole number of at least 1 is required", f"change {name}"
        )
    return value
