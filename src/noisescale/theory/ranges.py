"""Ranges that formulas ask of their numbers."""

from __future__ import annotations

import math

from noisescale.errors import InvalidInputError


def positive(name: str, value: float) -> float:
    """Return a positive finite number, or refuse it by name."""
    if not (value > 0 and math.isfinite(value)):
        raise InvalidInputError(
            f"{name} {value:g}", "a positive finite number is required", f"check {name}"
        )
    return value


def fraction(name: str, value: float) -> float:
    """Return a number in [0, 1), or refuse it by name."""
    if not 0 <= value < 1:
        raise InvalidInputError(f"{name} {value:g}", "a number in [0, 1) is required", "change it")
    return value
