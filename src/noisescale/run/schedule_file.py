"""The function behind ``noisescale schedule``: a recipe file, or keys alone, to a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from os import PathLike
from typing import Any

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule.plan import plan_schedule
from noisescale.plan.schedule.text import read_number, restate
from noisescale.records import Recipe, SchedulePlan
from noisescale.records.rate_schedule import require_unit
from noisescale.run.overrides import parse_overrides, recipe_changes


def schedule_file(
    path: str | PathLike[str] | None = None,
    *,
    overrides: Iterable[str] = (),
    total: int | str | None = None,
    unit: str | None = None,
    threshold_unit: str | None = None,
    size_unit: str | None = None,
    sequence_length: int | None = None,
    dataset_size: int | None = None,
    micro_batch_size: int | None = None,
    replicas: int | None = None,
    warmup_batch: str | None = None,
    **options: Any,
) -> SchedulePlan:
    """Plan batch sizes and rates along the training of a recipe file.

    Args:
        path: a TOML, YAML or JSON file: our own flat keys, or a configuration of Transformers,
            DeepSpeed, Lightning or timm; None for a recipe of ``overrides`` alone.
        overrides: ``key=value`` texts that change or make the recipe.
        total: length of the training, K, M, B or T may follow it; it counts what the thresholds
            of ``text`` count, or without a text ``unit`` or the recipe's unit. The recipe's by
            default.
        unit: what ``text`` counts, and without a file the recipe too.
        threshold_unit: what the thresholds of ``text`` count, where it is not ``unit``.
        size_unit: what its sizes count, where it is not ``unit``.
        sequence_length: tokens per sequence, where the file does not say it.
        dataset_size: training examples, where the file does not say it.
        micro_batch_size: per pass and device; the file's by default.
        replicas: devices that train together; the file's by default.
        warmup_batch: "256:1M" or "256:1M:64": first size, length, increment.
        **options: as :func:`noisescale.plan.schedule.plan.plan_schedule` takes them.

    Raises:
        InvalidInputError: the file cannot be read or does not say its global batch, or what
            ``plan_schedule`` refuses.
        MissingExtraError: a library that reads this kind of file is not installed.
    """
    given = recipe_changes(parse_overrides(overrides))
    notes: tuple[str, ...] = ()
    if path is None:
        recipe = _made(given, size_unit or unit)
    else:
        from noisescale.formats.recipe_file import read_recipe

        file = read_recipe(path, world_size=replicas, dataset_size=dataset_size, given=given)
        if file.split is not None and file.world_size is None:
            raise InvalidInputError(
                f"{file.path}: the number of devices",
                "it is not said, and the global batch is micro-batch x accumulation x devices",
                "give --replicas N",
            )
        recipe, notes = file.recipe, file.notes
        if file.already_scaled is not None:
            notes += (f"{file.already_scaled.rstrip('.')}: the rates here follow the file's lr",)
        micro_batch_size = micro_batch_size or file.micro_batch_size
        replicas = replicas or file.world_size
    if total is not None:
        recipe = _lengthened(
            recipe, total, threshold_unit or unit or recipe.unit, sequence_length=sequence_length
        )
    if options.get("text") is None and (path is None or total is not None):
        unit = threshold_unit = size_unit = None  # they said what the recipe or the total counts
    plan = plan_schedule(
        recipe,
        unit=unit,
        threshold_unit=threshold_unit,
        size_unit=size_unit,
        sequence_length=sequence_length,
        dataset_size=dataset_size,
        micro_batch_size=micro_batch_size,
        replicas=replicas,
        warmup_batch=None if warmup_batch is None else _warmup(warmup_batch),
        **options,
    )
    return dataclasses.replace(plan, warnings=(*plan.warnings, *notes))


def _made(given: dict[str, Any], unit: str | None) -> Recipe:
    """Make a recipe of keys alone."""
    for key in ("lr", "batch_size"):
        if given.get(key) is None:
            raise InvalidInputError(
                f"no RECIPE and no {key}", "a recipe is required",
                "name a recipe file, or give --set lr=0.1 --set batch_size=128",
            )  # fmt: skip
    values = {"unit": unit} | given if unit is not None else given
    return Recipe(**{key: value for key, value in values.items() if value is not None})


def _lengthened(
    recipe: Recipe, total: int | str, unit: str, *, sequence_length: int | None
) -> Recipe:
    """Give a recipe another length, stated in a unit that may not be its own."""
    require_unit(unit)
    known = recipe.sequence_length or sequence_length
    length = restate(_number("total", total), unit, recipe.unit, sequence_length=known)
    return recipe.with_changes(total_examples=max(1, length), total_steps=None)


def _warmup(text: str) -> tuple[int, ...]:
    parts = text.split(":")
    if len(parts) not in (2, 3):
        raise InvalidInputError(
            f"warmup_batch {text!r}", "SIZE:LENGTH or SIZE:LENGTH:INCREMENT is required",
            "write for example 256:1M",
        )  # fmt: skip
    return tuple(_number("warmup_batch", part) for part in parts)


def _number(name: str, value: int | str) -> int:
    number = read_number(value) if isinstance(value, str) else value
    if number is None or number < 1:
        raise InvalidInputError(
            f"{name} {value!r}",
            "a whole number of at least 1 is required (K, M, B or T may follow it)",
            "write for example 300B",
        )
    return number
