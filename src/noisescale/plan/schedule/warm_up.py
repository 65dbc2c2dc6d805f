"""Begin with a small batch: few examples per step while the noise scale is still small."""

from __future__ import annotations

import dataclasses

from noisescale.errors import InvalidInputError
from noisescale.records import BatchPiece, BatchSchedule
from noisescale.records.rate_schedule import require_position


def ramp(
    *, start: int, end: int, length: int, increment: int | None = None, multiple_of: int = 1
) -> tuple[BatchPiece, ...]:
    """Go from one batch size to a larger one, with equally many examples at each size between.

    Args:
        start: first batch size.
        end: batch size from ``length`` on.
        length: position at which ``end`` is reached.
        increment: step from one size to the next; doublings by default.
        multiple_of: what the sizes must divide by.

    Raises:
        InvalidInputError: ``start`` is not below ``end``, a size does not divide, or the
            increments do not lead to ``end``.

    Source: doublings: Merrill et al. 2025 (arXiv:2505.23971), there at measured positions;
    increments: Megatron-LM's --rampup-batch-size.

    >>> [(p.start, p.batch_size) for p in ramp(start=8, end=32, length=1000)]
    [(0, 8), (500, 16), (1000, 32)]
    """
    sizes = _sizes(start, end, increment)
    if require_position("length of the batch warm-up", length) < len(sizes):
        raise InvalidInputError(
            f"a batch warm-up of length {length}", f"too short for {len(sizes)} sizes",
            "lengthen it",
        )  # fmt: skip
    for size in sizes:
        if size % multiple_of:
            raise InvalidInputError(
                f"batch size {size} of the warm-up", f"a multiple of {multiple_of} is required",
                "begin with another size",
            )  # fmt: skip
    pieces = [
        BatchPiece(start=index * length // len(sizes), batch_size=size)
        for index, size in enumerate(sizes)
    ]
    return (*pieces, BatchPiece(start=length, batch_size=end))


def begin_small(schedule: BatchSchedule, pieces: tuple[BatchPiece, ...]) -> BatchSchedule:
    """Put a ramp before a schedule, which holds from the ramp's last start on.

    Args:
        schedule: what follows; rates and coupling are its own, so the temperature is kept at the
            small sizes too where it is kept at the others.
        pieces: what :func:`ramp` returned, up to the schedule's size there.

    Raises:
        InvalidInputError: the ramp does not end at the schedule's size, or not before its total.
    """
    last = pieces[-1]
    if schedule.total is not None and last.start >= schedule.total:
        raise InvalidInputError(
            f"a batch warm-up until {last.start}",
            f"is longer than the training of {schedule.total} {schedule.unit}",
            "shorten the batch warm-up",
        )
    there = schedule.batch_size_at(last.start)
    if last.batch_size != there:
        raise InvalidInputError(
            f"a batch warm-up to {last.batch_size}",
            f"the schedule has grown to {there} by its end at {last.start}",
            "shorten the batch warm-up",
        )
    later = [piece for piece in schedule.pieces if piece.start > last.start]
    return dataclasses.replace(schedule, pieces=(*pieces, *later))


def _sizes(start: int, end: int, increment: int | None) -> list[int]:
    """The sizes below ``end``."""
    if not 1 <= start < end:
        raise InvalidInputError(
            f"a batch warm-up from {start}", f"a size from 1 to below {end} is required",
            "begin smaller",
        )  # fmt: skip
    if increment is None:
        # start * 2^k < end for k = 0, 1, ...
        return [start << k for k in range((-(-end // start) - 1).bit_length())]
    if increment < 1 or (end - start) % increment:
        raise InvalidInputError(
            f"increment {increment}", f"must divide {end} - {start} = {end - start}",
            "change it or the first size",
        )  # fmt: skip
    return list(range(start, end, increment))
