"""What a reader of a planned schedule must know besides."""

from __future__ import annotations

import math
from collections.abc import Iterator

from noisescale.plan.schedule.limits import Limit
from noisescale.records import BatchSchedule, Recipe, ScheduleRow
from noisescale.theory.per_example import SQUARE_ROOT, kept_per_step, shrinkage_unit
from noisescale.theory.scaling.limits import largest_batch_of

MUCH = 0.05
"""Share of a training beyond its end that is worth a word. (assumed)"""


RAISED = 2.0
"""Rise of the rate above the recipe's highest that is worth a word. (assumed)"""


def warnings_of(
    schedule: BatchSchedule,
    recipe: Recipe,
    rows: tuple[ScheduleRow, ...],
    limit: Limit | None,
) -> tuple[str, ...]:
    """Say what changes with the batch size although nobody asked for it.

    Args:
        schedule: the plan.
        recipe: the training as it was.
        rows: the plan row by row.
        limit: of the growth; None where none is wished.
    """
    largest = max(row.batch_size for row in rows)
    found = list(_leapt(schedule))
    if limit is not None:
        found = [*limit.notes, *_grown(rows, limit, recipe), *found]
    if largest != recipe.batch_size or len(schedule.pieces) > 1:
        found += [*_rate(schedule, recipe), *_averages(schedule, recipe, largest)]
        found += [*_few(rows, recipe), *_overshot(schedule, rows)]
    return tuple(found)


def instability(
    recipe: Recipe,
    curvature: float | None,
    schedule: BatchSchedule,
    rows: tuple[ScheduleRow, ...],
) -> tuple[str, ...]:
    """Say where the rate of a plan leaves stability, or without a curvature where it may.

    Raises:
        InvalidInputError: the recipe's optimizer has no such limit, or the curvature is not
            positive.
    """
    if curvature is None:
        return tuple(_raised(schedule, rows))
    limit = recipe.lr * largest_batch_of(recipe, curvature) / recipe.batch_size
    over = [row for row in rows if max(row.lr_first, row.lr_last) > limit * (1 + 1e-9)]
    if not over:
        return ()
    return (
        f"the rate is above the {limit:.3g} that a curvature of {curvature:g} tolerates from"
        f" {over[0].start:,} to {over[-1].stop:,} {recipe.unit}",
    )


def _grown(rows: tuple[ScheduleRow, ...], limit: Limit, recipe: Recipe) -> Iterator[str]:
    highest = max(max(row.lr_first, row.lr_last) for row in rows)
    if max(row.batch_size for row in rows) == recipe.batch_size and rows[-1].lr_last == highest:
        yield "the recipe's rate never falls, so there is nothing that the batch could grow for"
    reached = [row for row in rows if limit.size is not None and row.batch_size == limit.size]
    if reached and min(row.lr_last for row in reached) < 0.999 * reached[0].lr_first:
        where = f"{reached[0].start:,} {recipe.unit}"
        yield (
            f"the batch reaches {limit.size:,} ({limit.source}) at {where}: from there the rate"
            " decays"
        )


def _leapt(schedule: BatchSchedule) -> Iterator[str]:
    end = schedule.total or 0
    begun = [run.position for run in schedule.runs()]
    stops = [*(piece.start for piece in schedule.pieces[1:]), end]
    unused = [
        f"{piece.batch_size:,} from {piece.start:,} on"
        for piece, stop in zip(schedule.pieces, stops, strict=True)
        if piece.start < end and not any(piece.start <= at < stop for at in begun)
    ]
    if unused:
        shown = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if unused[3:] else "")
        yield f"never used, since one step leaps over them: {shown}"


def _raised(schedule: BatchSchedule, rows: tuple[ScheduleRow, ...]) -> Iterator[str]:
    segments = schedule.rate.segments if schedule.rate is not None else ()
    before = max((max(each.first, each.last or 0.0) for each in segments), default=0.0)
    now = max(max(row.lr_first, row.lr_last) for row in rows)
    if now > RAISED * before * (1 + 1e-9):
        yield (
            f"the rate goes up to {now:.3g}, {now / before:.3g} times the recipe's highest: whether"
            " that is stable is not known (a curvature tells it, for SGD)"
        )


def _rate(schedule: BatchSchedule, recipe: Recipe) -> Iterator[str]:
    normalised = recipe.optimizer_kind in SQUARE_ROOT
    if schedule.coupling == "none":
        yield "the rate does not follow the batch size: the noise per example changes with it"
    elif schedule.coupling == "square_root" and normalised:
        yield (
            "the square root of the batch size holds while noise dominates the gradient's size:"
            " batches well below the noise scale"
        )
    elif schedule.coupling == "square_root":
        yield (
            "the square root of the batch size keeps the noise of one step: the temperature"
            " lr / ((1 - m) B) is not the recipe's at other batch sizes"
        )
    elif normalised:
        yield (
            f"a rate in proportion to the batch size does not keep the temperature of"
            f" {recipe.optimizer}, whose steps are divided by the gradient's size: where noise"
            " dominates that, the larger batch has too large a rate"
        )


def _averages(schedule: BatchSchedule, recipe: Recipe, largest: int) -> Iterator[str]:
    ratio = largest / recipe.batch_size
    if ratio == 1:
        return
    kept = kept_per_step(recipe)
    named = ["betas"] if "beta1" in kept else []
    named += [name for name in ("alpha", "ema_decay") if name in kept]
    if named:
        verb = "count" if len(named) > 1 or named == ["betas"] else "counts"
        yield (
            f"{' and '.join(named)} {verb} steps: at batch {largest:,} the averages reach back over"
            f" {ratio:,.3g} times as many {recipe.unit}"
        )
    # At a rate of 1, since the share goes in proportion and tiny rates would underflow.
    here = recipe.with_changes(lr=1.0)
    there = here.with_changes(lr=schedule.rate_factor(largest), batch_size=largest)
    share = shrinkage_unit(there) / shrinkage_unit(here)
    if recipe.weight_decay and not math.isclose(share, 1, rel_tol=1e-6):
        yield (
            f"weight decay takes another share per example: at batch {largest:,} {share:.3g} times"
            f" that at batch {recipe.batch_size:,} and the same temperature; divide weight_decay"
            " by that to keep it"
        )


def _few(rows: tuple[ScheduleRow, ...], recipe: Recipe) -> Iterator[str]:
    found = kept_per_step(recipe)
    kept, name = recipe.momentum, "momentum"
    if not kept and "beta1" in found:
        kept, name = found["beta1"], "beta1"
    if not kept:
        return
    memory = 1 / (1 - kept)
    size = rows[-1].batch_size
    steps = sum(row.updates for row in rows if row.batch_size == size)
    if steps < memory:
        count = "1 step" if steps == 1 else f"{steps:,} steps"
        yield (
            f"only {count} at batch {size:,}: fewer than the {memory:.3g} over which {name}"
            " averages"
        )


def _overshot(schedule: BatchSchedule, rows: tuple[ScheduleRow, ...]) -> Iterator[str]:
    end, last = schedule.total or 0, rows[-1]
    # Steps are whole: the last one takes up to a batch more.
    if last.stop - end > MUCH * end:
        yield (
            f"the last step takes {last.batch_size:,} {schedule.unit} and ends at {last.stop:,}:"
            f" {last.stop - end:,} more than the training's {end:,}; a lower limit of growth"
            " avoids it"
        )
