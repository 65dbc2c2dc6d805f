"""Counts that users give: NumPy's and torch's whole numbers too, booleans and fractions not."""

from __future__ import annotations

import operator
from typing import Any

from noisescale.errors import InvalidInputError


def whole_number(value: Any, name: str, *, most: int, remedy: str) -> int:
    """Return a count.

    Args:
        value: what was given.
        name: how it is called in errors.
        most: the largest allowed; the least is 1.
        remedy: what to give instead.

    Raises:
        InvalidInputError: it is no whole number from 1 to ``most``.

    >>> whole_number(8, "batch_size", most=64, remedy="give fewer")
    8
    """
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or not 1 <= count <= most:
        raise InvalidInputError(
            f"{name} {value!r}", f"a whole number from 1 to {most} is required", remedy
        )
    return count
