"""How far the batch may grow, and what every size must be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from noisescale.errors import InvalidInputError
from noisescale.plan.schedule.sizes import Sizes, require_multiple
from noisescale.plan.schedule.text import restate
from noisescale.records import BatchSchedule, Recipe
from noisescale.theory.scaling.limits import largest_batch_of

SHARE_OF_DATA = 0.1
"""Largest batch over the data set, up to which the batch grows. (paper: Smith et al. 2018, sec. 3,
who grow the batch until about N / 10 and decay the rate from there)"""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The largest batch size of a growth.

    Attributes:
        size: in the recipe's unit; None where nothing limits it.
        source: what set it.
        notes: what was left out and why.
    """

    size: int | None = None
    source: str = ""
    notes: tuple[str, ...] = ()

    def among(self, sizes: Sizes) -> Self:
        """Return the limit at the largest size that may be taken."""
        if self.size is None or self.size == sizes.top:
            return self
        kind = "doublings" if sizes.powers else "multiples"
        source = f"{self.source}, {self.size:,}, in {kind} of {sizes.multiple_of:,}"
        return dataclasses.replace(self, size=sizes.top, source=source)


def growth_limit(
    recipe: Recipe, *, max_batch_size: int | None = None, critical_batch: float | None = None
) -> Limit:
    """Return the least of what limits the growth, and never less than the recipe's batch.

    Args:
        recipe: its ``dataset_size`` gives a tenth of the data, unless ``max_batch_size`` is given.
        max_batch_size: largest batch that is wanted or fits.
        critical_batch: batch size above which examples are wasted.

    Raises:
        InvalidInputError: ``max_batch_size`` is below the recipe's batch size or above the data,
            or ``critical_batch`` is no positive number.

    >>> growth_limit(Recipe(lr=0.1, batch_size=128, dataset_size=50_000)).size
    5000
    """
    limits: dict[str, float] = {}
    data, notes = _data(recipe), tuple[str, ...]()
    if max_batch_size is not None:
        _check_largest(recipe, max_batch_size, data)
        limits["the largest batch size given"] = max_batch_size
    elif data is not None:
        limits["a tenth of the data"] = SHARE_OF_DATA * data * (1 + 1e-12)
    elif recipe.dataset_size is not None:
        notes = (
            "dataset_size counts examples, the batch tokens: without sequence_length it sets"
            " no limit",
        )
    if critical_batch is not None:
        if not 0 < critical_batch < math.inf:
            raise InvalidInputError(
                f"critical_batch {critical_batch}", "a positive number is required", "change it"
            )
        limits["the critical batch"] = critical_batch
    if not limits:
        return Limit(notes=notes)
    source = min(limits, key=lambda name: limits[name])
    size = int(limits[source])
    if size < recipe.batch_size:
        notes = (
            *notes,
            f"{source} ({size:,}) is below the batch size of {recipe.batch_size:,}:"
            " the batch does not grow",
        )
    return Limit(size=max(size, recipe.batch_size), source=source, notes=notes)


def tolerance(recipe: Recipe, curvature: float | None) -> Callable[[float], float] | None:
    """Return the largest stable batch size by the temperature over the recipe's.

    Args:
        recipe: of SGD.
        curvature: largest eigenvalue of the Hessian; None for no such limit.

    Raises:
        InvalidInputError: the recipe's optimizer has no such limit, or the curvature is not
            positive.
    """
    if curvature is None:
        return None
    at_first = largest_batch_of(recipe, curvature)
    return lambda share: at_first / share


def growth_sizes(recipe: Recipe, limit: Limit, *, multiple_of: int, powers: bool) -> Sizes:
    """Return what a growing batch may be: multiples, or the recipe's own times powers of two."""
    require_multiple(recipe.batch_size, multiple_of)
    largest = Sizes().largest if limit.size is None else limit.size
    step = recipe.batch_size if powers else multiple_of
    return Sizes(multiple_of=step, powers=powers, largest=largest)


def check_sizes(schedule: BatchSchedule, recipe: Recipe, *, multiple_of: int) -> None:
    """Refuse sizes that do not divide, or exceed the data.

    Raises:
        InvalidInputError: one does.
    """
    data = _data(recipe)
    for piece in schedule.pieces:
        require_multiple(piece.batch_size, multiple_of)
        if data is not None and piece.batch_size > data:
            raise InvalidInputError(
                f"batch size {piece.batch_size} from {piece.start} on",
                f"is larger than the data ({data:.0f} {recipe.unit})",
                "lower it or correct dataset_size",
            )


def _check_largest(recipe: Recipe, largest: int, data: int | None) -> None:
    if largest < recipe.batch_size:
        raise InvalidInputError(
            f"max_batch_size {largest}",
            f"is below the recipe's batch size of {recipe.batch_size}",
            "raise it",
        )
    if data is not None and largest > data:
        raise InvalidInputError(
            f"max_batch_size {largest}",
            f"is larger than the data ({data} {recipe.unit})",
            "lower it or correct dataset_size",
        )


def _data(recipe: Recipe) -> int | None:
    """Size of the data in the recipe's unit; None where it cannot be known."""
    if recipe.dataset_size is None:
        return None
    if recipe.unit == "tokens" and recipe.sequence_length is None:
        return None
    return restate(
        recipe.dataset_size, "examples", recipe.unit, sequence_length=recipe.sequence_length
    )
