"""A batch size and a learning rate along a training, by position in the data."""

from __future__ import annotations

import bisect
import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from noisescale.errors import InvalidInputError, nearest
from noisescale.records.rate_schedule import (
    RateSchedule,
    require_ascending,
    require_position,
    require_unit,
)
from noisescale.records.serial import Record

COUPLINGS = ("linear", "square_root", "none")


class ScheduledStep(NamedTuple):
    """One optimizer step: where it begins, how much it takes, at which rate."""

    position: int
    batch_size: int
    lr: float | None


@dataclass(frozen=True, kw_only=True)
class BatchPiece(Record):
    """The batch size from a position on.

    Attributes:
        start: position from which it holds, in the schedule's unit.
        batch_size: global batch size, in the same unit.
    """

    start: int
    batch_size: int

    def __post_init__(self) -> None:
        require_position("start", self.start)
        try:
            size = 0 if isinstance(self.batch_size, bool) else operator.index(self.batch_size)
        except TypeError:
            size = 0
        if size < 1:
            raise InvalidInputError(
                f"batch_size {self.batch_size!r} from {self.start} on",
                "a whole number of at least 1 is required",
                "change it",
            )


class PieceRun(NamedTuple):
    """The steps of one piece: ``updates`` steps of ``batch_size``, the first at ``position``."""

    position: int
    batch_size: int
    updates: int

    @property
    def stop(self) -> int:
        """Position after the last of them."""
        return self.position + self.updates * self.batch_size


@dataclass(frozen=True, kw_only=True)
class BatchSchedule(Record):
    """Batch sizes by position, and the rate that goes with them.

    A step takes the batch size that holds where it begins, whole, even across a threshold; so the
    next piece begins up to one batch after its threshold, and only there the size changes.

    Attributes:
        pieces: in ascending order, the first from 0.
        unit: what positions and sizes count: ``examples``, ``sequences`` or ``tokens``.
        rate: the rate by position of a training at ``reference_batch_size``; None where the
            schedule says nothing about rates.
        reference_batch_size: batch size that ``rate`` is meant for.
        coupling: what the rate is multiplied by at another batch size: ``linear`` (B/reference),
            ``square_root`` (its root) or ``none``.
        total: length of the training; None where it has none.
    """

    pieces: tuple[BatchPiece, ...]
    unit: str = "examples"
    rate: RateSchedule | None = None
    reference_batch_size: int | None = None
    coupling: str = "none"
    total: int | None = None

    def __post_init__(self) -> None:
        require_unit(self.unit)
        require_ascending("pieces", [piece.start for piece in self.pieces])
        if self.coupling not in COUPLINGS:
            raise InvalidInputError(
                f"coupling {self.coupling!r}", "not a coupling of the rate to the batch size",
                nearest(str(self.coupling), COUPLINGS),
            )  # fmt: skip
        if self.total is not None:
            require_position("total", self.total)
        if self.rate is None:
            return
        if self.rate.unit != self.unit:
            raise InvalidInputError(
                f"a rate by {self.rate.unit}",
                f"contradicts batch sizes in {self.unit}",
                "state both in one unit",
            )
        if self.coupling != "none" and not (self.reference_batch_size or 0) > 0:
            raise InvalidInputError(
                f"coupling {self.coupling!r} without reference_batch_size",
                "the batch size that the rate is meant for is required",
                "give reference_batch_size",
            )

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [piece.start for piece in self.pieces]

    def batch_size_at(self, position: int) -> int:
        """Return the batch size of a step that begins at a position.

        >>> steps = (BatchPiece(start=0, batch_size=8), BatchPiece(start=100, batch_size=16))
        >>> schedule = BatchSchedule(pieces=steps)
        >>> schedule.batch_size_at(99), schedule.batch_size_at(100)
        (8, 16)
        """
        if not position >= 0:
            raise InvalidInputError(
                f"position {position}", "a position of at least 0 is required", "count from 0"
            )
        return self.pieces[bisect.bisect_right(self._starts, position) - 1].batch_size

    def lr_at(self, position: int) -> float | None:
        """Return the learning rate of a step that begins at a position; None without rates."""
        if self.rate is None:
            return None
        return self.rate.at(position) * self.rate_factor(self.batch_size_at(position))

    def rate_factor(self, batch_size: int) -> float:
        """Return what the coupling multiplies the rate by at a batch size."""
        if self.coupling == "none" or self.reference_batch_size is None:
            return 1.0
        ratio = batch_size / self.reference_batch_size
        return math.sqrt(ratio) if self.coupling == "square_root" else ratio

    def steps(self, *, start: int = 0, total: int | None = None) -> Iterator[ScheduledStep]:
        """Go through the optimizer steps: each advances by the batch size that it takes.

        Args:
            start: position to begin at; one that steps from 0 reach, for the same steps.
            total: position at which no further step begins; the schedule's own by default,
                endless without either.
        """
        end = self._end(total) if total is not None or self.total is not None else math.inf
        position = require_position("start", start)
        while position < end:
            size = self.batch_size_at(position)
            yield ScheduledStep(position, size, self.lr_at(position))
            position += size

    def runs(self, total: int | None = None) -> tuple[PieceRun, ...]:
        """Return the steps piece by piece, without going through them.

        A piece that a single step of the one before leaps over has no steps and is left out.

        Args:
            total: position at which no further step begins; the schedule's own by default.
        """
        end, position = self._end(total), 0
        found = []
        stops = [*self._starts[1:], end]
        for piece, stop in zip(self.pieces, stops, strict=True):
            # In whole numbers: rounding in floating point would miscount long trainings.
            updates = max(0, -((position - min(stop, end)) // piece.batch_size))
            if updates:
                found.append(PieceRun(position, piece.batch_size, updates))
                position = found[-1].stop
        return tuple(found)

    def updates(self, total: int | None = None) -> int:
        """Return the optimizer steps of a training, summed over the pieces.

        Args:
            total: position at which no further step begins; the schedule's own by default.

        Raises:
            InvalidInputError: there is no total.

        >>> steps = (BatchPiece(start=0, batch_size=8), BatchPiece(start=100, batch_size=16))
        >>> BatchSchedule(pieces=steps).updates(200)  # 13 of 8 to position 104, 6 of 16
        19
        """
        return sum(run.updates for run in self.runs(total))

    def position_after(self, updates: int) -> int:
        """Return the position that so many optimizer steps from 0 reach.

        >>> steps = (BatchPiece(start=0, batch_size=8), BatchPiece(start=100, batch_size=16))
        >>> BatchSchedule(pieces=steps).position_after(14)
        120
        """
        left, position = require_position("updates", updates), 0
        for piece, stop in zip(self.pieces, [*self._starts[1:], None], strict=True):
            most = left if stop is None else max(0, -((position - stop) // piece.batch_size))
            taken = min(left, most)
            position += taken * piece.batch_size
            left -= taken
        return position

    def _end(self, total: int | None) -> int:
        end: Any = self.total if total is None else total
        if end is None:
            raise InvalidInputError(
                "a schedule without a total", "the length of the training is required", "give total"
            )
        return require_position("total", end)
