"""A learning rate along a training, by position in the data rather than by steps."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from noisescale.errors import InvalidInputError, nearest
from noisescale.records.serial import Record

FARTHEST = 2**53
"""Positions go up to here: above, floating point no longer tells neighbours apart."""

SHAPES = ("constant", "linear", "cosine")

UNITS = ("examples", "sequences", "tokens")


@dataclass(frozen=True, kw_only=True)
class RateSegment(Record):
    """The rate over one stretch of the data.

    Attributes:
        start: position at which it begins, in the schedule's unit.
        stop: position at which ``last`` is reached; not needed by a constant one.
        shape: ``constant``, ``linear`` or ``cosine`` (half a wave) from ``first`` to ``last``.
        first: learning rate at ``start``.
        last: learning rate at ``stop`` and after it; as ``first`` where constant.
    """

    start: int
    stop: int | None = None
    shape: str = "constant"
    first: float
    last: float | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise InvalidInputError(
                f"shape {self.shape!r}", "not a shape of a rate", nearest(str(self.shape), SHAPES)
            )
        _require_rate("first", self.first)
        if self.last is not None:
            _require_rate("last", self.last)
        require_position("start", self.start)
        if self.shape == "constant":
            return
        if (
            self.stop is None
            or self.last is None
            or require_position("stop", self.stop) <= (self.start)
        ):
            raise InvalidInputError(
                f"a {self.shape} rate from {self.start}",
                "a stop after its start and a last rate are required",
                "give stop and last",
            )

    def at(self, position: float) -> float:
        """Return the learning rate at a position that is not before ``start``."""
        if self.stop is None or self.last is None or self.shape == "constant":
            return self.first
        done = min(1.0, (position - self.start) / (self.stop - self.start))
        kept = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.last + (self.first - self.last) * kept


@dataclass(frozen=True, kw_only=True)
class RateSchedule(Record):
    """A learning rate by position: one look-up is a bisection over the segments.

    Attributes:
        segments: in ascending order, the first from 0; each holds until the next one's start.
        unit: what positions count: ``examples``, ``sequences`` or ``tokens``.
    """

    segments: tuple[RateSegment, ...]
    unit: str = "examples"

    def __post_init__(self) -> None:
        require_unit(self.unit)
        require_ascending("segments", [segment.start for segment in self.segments])

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [segment.start for segment in self.segments]

    def at(self, position: float) -> float:
        """Return the learning rate of a step that begins at a position.

        Raises:
            InvalidInputError: the position is negative.

        >>> half = RateSegment(start=100, first=0.5)
        >>> RateSchedule(segments=(RateSegment(start=0, first=1.0), half)).at(150)
        0.5
        """
        if not position >= 0:
            raise InvalidInputError(
                f"position {position}", "a position of at least 0 is required", "count from 0"
            )
        return self.segments[bisect.bisect_right(self._starts, position) - 1].at(position)

    @property
    def constant_by_pieces(self) -> bool:
        """Whether the rate changes at the segments' starts only."""
        return all(segment.shape == "constant" for segment in self.segments)


def require_unit(unit: Any) -> None:
    """Refuse what is no unit of data.

    Raises:
        InvalidInputError: it is none.
    """
    if unit not in UNITS:
        raise InvalidInputError(f"unit {unit!r}", "not a unit", nearest(str(unit), UNITS))


def require_position(name: str, value: Any) -> int:
    """Return a whole position, at most :data:`FARTHEST`.

    Raises:
        InvalidInputError: it is none.
    """
    try:
        position = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        position = -1
    if not 0 <= position <= FARTHEST:
        raise InvalidInputError(
            f"{name} {value!r}", f"a whole number from 0 to {FARTHEST} is required", "change it"
        )
    return position


def require_ascending(name: str, starts: Sequence[int]) -> None:
    """Refuse pieces that do not begin at 0 or do not ascend.

    Raises:
        InvalidInputError: so it is.
    """
    if not starts or starts[0] != 0:
        raise InvalidInputError(
            f"{name} that begin at {starts[0]}" if starts else f"no {name}",
            "a first one that begins at 0 is required",
            "say what holds from 0 on",
        )
    for before, after in itertools.pairwise(starts):
        if after <= before:
            raise InvalidInputError(
                f"{name} at {before} and then {after}",
                "ascending starts, each once, are required",
                "put them in order",
            )


def _require_rate(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 <= value < math.inf):
        raise InvalidInputError(
            f"{name} rate {value!r}", "a finite rate of at least 0 is required", "change it"
        )
