"""Batch sizes and noise scales said in one unit, wanted in another."""

from __future__ import annotations

from typing import Any

from noisescale.errors import InvalidInputError, nearest
from noisescale.plan.split import MAX_SIZE
from noisescale.plan.whole_numbers import whole_number
from noisescale.records import NoiseScale, Outcome, Recipe

UNITS = ("examples", "sequences", "tokens")


def in_unit_of(recipe: Recipe, batch_size: Any, unit: str | None, where: str) -> int:
    """Return a batch size in the unit of a recipe.

    An example of a recipe that counts sequences is a sequence; tokens are counted by its
    ``sequence_length``.

    Args:
        recipe: its unit, sequence length and number of examples are used.
        batch_size: whole number of at least 1, in ``unit``.
        unit: ``examples``, ``sequences`` or ``tokens``; the recipe's by default.
        where: how the recipe is called in errors.

    Raises:
        InvalidInputError: it is no such number, is no whole number in the recipe's unit, the
            sequence length is missing, or there are fewer examples.

    >>> old = Recipe(lr=0.1, batch_size=512, unit="sequences", sequence_length=1024)
    >>> in_unit_of(old, 2**20, "tokens", "recipe")
    1024
    """
    size = whole_number(
        batch_size,
        "batch_size",
        most=MAX_SIZE,
        remedy="give the examples per optimizer step over all devices",
    )
    if unit is not None and unit not in UNITS:
        raise InvalidInputError(f"unit {unit!r}", "not a unit", nearest(str(unit), UNITS))
    if unit is not None and (unit == "tokens") != (recipe.unit == "tokens"):
        size = _converted(recipe, size, unit, where)
    _refuse_more_than_the_data(recipe, size, where)
    return size


def noise_scale_of(
    noise_scale: float | NoiseScale | None, recipe: Recipe, where: str
) -> float | None:
    """Return a noise scale in the unit of a recipe.

    Args:
        noise_scale: a number in that unit, or a measurement in its own.
        recipe: its unit and sequence length are used.
        where: how the recipe is called in errors.

    Raises:
        InvalidInputError: the measurement determined no value, or the sequence length that
            leads from its unit to the recipe's is missing.
    """
    if not isinstance(noise_scale, NoiseScale):
        return noise_scale
    if noise_scale.outcome is not Outcome.DETERMINED or noise_scale.b_simple is None:
        raise InvalidInputError(
            f"noise_scale with outcome {noise_scale.outcome}",
            "a noise scale that was determined is required",
            "measure more steps, or convert without it",
        )
    value = noise_scale.b_simple
    if (noise_scale.unit == "tokens") == (recipe.unit == "tokens"):
        return value
    length = _sequence_length(recipe, f"a noise scale in {noise_scale.unit}", where)
    return value * length if recipe.unit == "tokens" else value / length


def _converted(recipe: Recipe, size: int, unit: str, where: str) -> int:
    length = _sequence_length(recipe, f"a batch size in {unit}", where)
    if recipe.unit == "tokens":
        return size * length
    sequences, rest = divmod(size, length)
    if rest:
        sizes = [n * length for n in (sequences, sequences + 1) if n]
        raise InvalidInputError(
            f"batch_size {size} tokens",
            f"is no whole number of sequences of {length} tokens",
            f"give {' or '.join(map(str, sizes))}",
        )
    return sequences


def _sequence_length(recipe: Recipe, what: str, where: str) -> int:
    if recipe.sequence_length is None:
        raise InvalidInputError(
            f"{where}: sequence_length",
            f"it is missing, and {what} for a recipe in {recipe.unit} needs it",
            "add sequence_length",
        )
    return recipe.sequence_length


def _refuse_more_than_the_data(recipe: Recipe, size: int, where: str) -> None:
    count = recipe.dataset_size
    if count is not None and recipe.unit == "tokens":
        # Without the length of a sequence nobody knows how many tokens there are.
        count = count * recipe.sequence_length if recipe.sequence_length else None
    if count is not None and size > count:
        raise InvalidInputError(
            f"batch_size {size}",
            f"the data has {count} {recipe.unit} (dataset_size in {where})",
            f"give at most {count}",
        )
