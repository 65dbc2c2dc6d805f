"""A planned schedule: what it does piece by piece, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass

from noisescale.records.recipe import Recipe
from noisescale.records.schedule import BatchSchedule
from noisescale.records.serial import Record


@dataclass(frozen=True, kw_only=True)
class ScheduleRow(Record):
    """The steps between two changes of the batch size or of the rate's rule.

    Attributes:
        start: position of the first step, in the schedule's unit.
        stop: position after the last step; a step that begins before the end is whole.
        batch_size: global batch size of each.
        accumulation: passes per step and device; None where the micro-batch is not known.
        lr_first: learning rate of the first step.
        lr_last: learning rate of the last step.
        temperature_first: lr / ((1 - m) B) of the first step; Adam and LAMB: lr / sqrt(B).
        temperature_last: the same of the last step.
        updates: optimizer steps.
    """

    start: int
    stop: int
    batch_size: int
    accumulation: int | None = None
    lr_first: float
    lr_last: float
    temperature_first: float
    temperature_last: float
    updates: int


@dataclass(frozen=True, kw_only=True)
class SchedulePlan(Record):
    """What ``noisescale schedule`` returns.

    Attributes:
        recipe: the training as it was: one batch size, its own rate schedule.
        schedule: the training as planned.
        rows: the plan, row by row.
        updates: optimizer steps of the plan.
        original_updates: optimizer steps of the recipe.
        updates_saved: share of the recipe's steps that the plan saves; below 0 where it adds.
        limit: largest batch size of the growth; None where nothing limits it.
        limit_source: what set it.
        text: the batch sizes as "0:768 250B:1536", thresholds and sizes in the schedule's unit.
        rule: what is kept, and how.
        source: of the rule.
        warnings: what a reader must know besides, one sentence each.
    """

    recipe: Recipe
    schedule: BatchSchedule
    rows: tuple[ScheduleRow, ...]
    updates: int
    original_updates: int
    updates_saved: float
    limit: int | None = None
    limit_source: str = ""
    text: str
    rule: str
    source: str
    warnings: tuple[str, ...] = ()
