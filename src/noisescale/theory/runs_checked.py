"""Checks of batch sizes and steps that come from outside."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError

Array = npt.NDArray[np.float64]

LARGEST = 1e15
"""Batch sizes and steps beyond this, or below its inverse, are taken for mistakes. (assumed)"""


def checked_runs(
    batch_size: npt.ArrayLike, steps: npt.ArrayLike, censored: npt.ArrayLike | None, level: float
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Return sizes, log(steps) and the censored mask, all of shape (n,).

    Raises:
        InvalidInputError: they cannot be used; see :func:`noisescale.fit_tradeoff`.
    """
    sizes, counts = positive("batch_size", batch_size), positive("steps", steps)
    late = np.zeros(sizes.shape, bool) if censored is None else np.asarray(censored)
    if late.dtype.kind not in "biu" or not np.isin(late, (0, 1)).all():
        raise InvalidInputError(
            "censored", "True or False for each run is required", "pass booleans"
        )
    late = late.astype(bool)
    if sizes.ndim != 1 or not sizes.shape == counts.shape == late.shape:
        raise InvalidInputError(
            f"batch_size of shape {sizes.shape}, steps {counts.shape}, censored {late.shape}",
            "one-dimensional arrays of equal length are required",
            "pass one entry per run",
        )
    for name, array in (("batch_size", sizes), ("steps", counts)):
        wrong = array[(array > LARGEST) | (array < 1 / LARGEST)]
        if wrong.size:
            raise InvalidInputError(
                f"{name} {wrong[0]:g}",
                f"a number between {1 / LARGEST:g} and {LARGEST:g} is required",
                f"check {name}",
            )
    if len(np.unique(sizes)) < 2:
        raise InvalidInputError(
            f"batch_size: all {len(sizes)} values are {sizes[0]:g}" if len(sizes) else "no rows",
            "at least two distinct batch sizes are required",
            "add runs at other batch sizes",
        )
    if not 0 < level < 1:
        raise InvalidInputError(
            f"level {level:g}", "a value between 0 and 1 is required", "give for example 0.95"
        )
    return sizes, np.log(counts), late


def positive(name: str, values: npt.ArrayLike) -> Array:
    """Return an array of positive finite numbers.

    Raises:
        InvalidInputError: a value is not.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInputError(
            f"{name} {values!r}", "numbers are required", "pass positive numbers"
        ) from None
    wrong = ~(np.isfinite(array) & (array > 0))
    if wrong.any():
        raise InvalidInputError(
            f"{name} {array[wrong].flat[0]:g}",
            "a positive finite number is required",
            f"check {name}",
        )
    return array
