"""A schedule row by row, as it is shown."""

from __future__ import annotations

import dataclasses

from noisescale.records import BatchPiece, BatchSchedule, PieceRun, Recipe, ScheduleRow
from noisescale.theory.per_example import rate_coordinate


def schedule_rows(
    schedule: BatchSchedule, recipe: Recipe, *, share: int | None = None
) -> tuple[ScheduleRow, ...]:
    """Cut a schedule where its batch size or the rule of its rate changes.

    Args:
        schedule: with its rate and its total.
        recipe: its optimizer and momentum say what a temperature is.
        share: what all devices take in one pass; the accumulation is not known without.
    """
    return tuple(_row(run, schedule, recipe, share) for run in _cut(schedule).runs())


def temperature_at(recipe: Recipe, *, lr: float, batch_size: int) -> float:
    """Return the rate per example at another rate and batch size; 0 at a rate of 0."""
    return rate_coordinate(recipe.with_changes(lr=lr, batch_size=batch_size)) if lr else 0.0


def _cut(schedule: BatchSchedule) -> BatchSchedule:
    """Add a piece of unchanged size wherever the rate's rule changes: no step moves by that."""
    segments = schedule.rate.segments if schedule.rate is not None else ()
    starts = {piece.start for piece in schedule.pieces} | {s.start for s in segments}
    starts |= {s.stop for s in segments if s.stop is not None and _goes_on(schedule, s.stop)}
    pieces = [
        BatchPiece(start=start, batch_size=schedule.batch_size_at(start))
        for start in sorted(starts)
    ]
    return dataclasses.replace(schedule, pieces=tuple(pieces))


def _goes_on(schedule: BatchSchedule, position: int) -> bool:
    """Whether more than one step follows: a rate that ends with the training needs no own row."""
    return schedule.total is None or position + schedule.batch_size_at(position) < schedule.total


def _row(run: PieceRun, schedule: BatchSchedule, recipe: Recipe, share: int | None) -> ScheduleRow:
    last = run.stop - run.batch_size
    first_lr, last_lr = (schedule.lr_at(position) or 0.0 for position in (run.position, last))
    return ScheduleRow(
        start=run.position,
        stop=run.stop,
        batch_size=run.batch_size,
        accumulation=run.batch_size // share if share else None,
        lr_first=first_lr,
        lr_last=last_lr,
        temperature_first=temperature_at(recipe, lr=first_lr, batch_size=run.batch_size),
        temperature_last=temperature_at(recipe, lr=last_lr, batch_size=run.batch_size),
        updates=run.updates,
    )
