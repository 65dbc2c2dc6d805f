"""The counts of steps in a recipe's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from noisescale.errors import InvalidInputError

COUNTS = ("milestones", "decay_steps", "points")
"""Keys of a schedule that count steps."""


def recounted(
    schedule: Mapping[str, Any] | None, count: Callable[[float], float]
) -> dict[str, Any] | None:
    """Return a schedule whose counts of steps have been counted anew.

    Args:
        schedule: ``milestones`` (a list of steps), ``decay_steps`` (a number of them) and
            ``points`` (pairs of a step and a factor) are counts; what else it has is kept.
        count: from a number of steps to another number.

    Returns:
        A new table; None where there is none.

    Raises:
        InvalidInputError: a count is not a number of at least 0.

    >>> recounted({"kind": "step", "milestones": [10, 20], "gamma": 0.1}, lambda steps: steps / 2)
    {'kind': 'step', 'milestones': [5.0, 10.0], 'gamma': 0.1}
    """
    if schedule is None:
        return None
    found = dict(schedule)
    if found.get("milestones"):
        found["milestones"] = [count(_steps(step)) for step in _list("milestones", found)]
    if found.get("decay_steps") is not None:
        found["decay_steps"] = count(_steps(found["decay_steps"]))
    if found.get("points"):
        found["points"] = [
            [count(_steps(point[0])), *point[1:]] for point in map(_point, _list("points", found))
        ]
    return found


def whole(steps: float) -> float:
    """Return a whole number where only the last digits say otherwise.

    >>> whole(4.999999999999), whole(4.9)
    (5, 4.9)
    """
    near = round(steps)
    # (assumed: no count means a billionth of itself)
    return near if abs(steps - near) <= 1e-9 * steps else steps


def _list(key: str, schedule: Mapping[str, Any]) -> list[Any]:
    value = schedule[key]
    if not isinstance(value, list | tuple):
        raise InvalidInputError(f"schedule {key} {value!r}", "a list is required", "change it")
    return list(value)


def _point(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InvalidInputError(
            f"schedule point {value!r}", "a step and a factor are required", "write [100, 0.1]"
        )
    return list(value)


def _steps(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and value >= 0 and math.isfinite(value)):
        raise InvalidInputError(
            f"schedule count {value!r}", "a number of steps is required", "change the schedule"
        )
    return float(value) if isinstance(value, float) else int(value)
