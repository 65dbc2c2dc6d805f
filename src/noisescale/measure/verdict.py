"""From measured steps to the record that a reader gets, with every qualification it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from noisescale.measure.gradients import Inventory
from noisescale.measure.step_log import History, StepLog
from noisescale.records import NoiseScale, Outcome
from noisescale.theory.interval import RatioEstimate, estimate_moving


class SplitCost(NamedTuple):
    """What extra passes cost so far.

    Attributes:
        passes: forward and backward passes over a micro-batch.
        examples: examples that went through them.
        seconds: wall time.
    """

    passes: int = 0
    examples: int = 0
    seconds: float = 0.0

    def plus(self, other: SplitCost) -> SplitCost:
        """Add up two costs."""
        return SplitCost(
            self.passes + other.passes,
            self.examples + other.examples,
            self.seconds + other.seconds,
        )


NO_COST = SplitCost()


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a record must say besides the numbers.

    Attributes:
        source: ``examples`` or ``microbatches``.
        unit: what one row of a batch is.
        population_size: size of the finite population; None for an infinite one.
        level: confidence level.
        refused: steps that the source could not measure.
        refusal: why, for the last of them.
        abandoned: steps whose gradients were dropped before the optimizer used them.
        closes_itself: whether an optimizer ends the steps.
        normalised: whether BatchNorm was in training mode inside the units.
        split_cost: cost of extra passes.
        preconditioner: name of the norm.
        norm_notes: what a reader must know of it.
    """

    source: str
    unit: str = "examples"
    population_size: int | None = None
    level: float = 0.95
    refused: int = 0
    refusal: str = ""
    abandoned: int = 0
    closes_itself: bool = True
    normalised: bool = False
    split_cost: SplitCost = NO_COST
    preconditioner: str = "none"
    norm_notes: tuple[str, ...] = ()

    @property
    def population(self) -> str:
        """Name of the population, as records spell it."""
        return "infinite" if self.population_size is None else "train_set"


def moving_record(
    log: StepLog,
    history: History,
    inventory: Inventory,
    circumstances: Circumstances,
    group: str | None,
) -> NoiseScale:
    """Judge the measured steps of a moving model."""
    skipped = log.skipped + circumstances.abandoned
    count = len(history.step)
    if count:
        estimate = estimate_moving(
            grad_sq=history.grad_sq,
            trace_cov=history.trace_cov,
            examples=history.examples,
            level=circumstances.level,
        )
    else:
        estimate = undetermined(circumstances, skipped)
    notes = _notes(log, inventory, circumstances, measured=count)
    return record(
        estimate,
        inventory,
        circumstances,
        group=group,
        steps=count,
        examples=int(history.examples.sum()),
        skipped=skipped,
        notes=notes,
    )


def undetermined(circumstances: Circumstances, skipped: int) -> RatioEstimate:
    """Say why not a single step was measured."""
    if circumstances.refused:
        outcome, detail = Outcome.UNSUPPORTED, circumstances.refusal
    elif circumstances.abandoned and not circumstances.closes_itself:
        outcome, detail = (
            Outcome.UNSUPPORTED,
            "gradients were zeroed before their step was closed; give the meter the optimizer, or"
            " call close_step() after the last backward pass of a step",
        )
    elif skipped:
        outcome, detail = Outcome.NOT_FINITE, "every measured step held NaN or infinity"
    else:
        outcome, detail = Outcome.TOO_FEW_STEPS, "no step was measured yet"
    return RatioEstimate(
        outcome=outcome,
        b_simple=None,
        low=None,
        high=None,
        level=circumstances.level,
        grad_sq=None,
        trace_cov=None,
        detail=detail,
    )


def record(
    estimate: RatioEstimate,
    inventory: Inventory,
    circumstances: Circumstances,
    *,
    group: str | None,
    steps: int,
    examples: int,
    skipped: int,
    notes: list[str],
) -> NoiseScale:
    """Build the record of an estimate, its detail one line of sentences."""
    return NoiseScale(
        b_simple=estimate.b_simple,
        low=estimate.low,
        high=estimate.high,
        level=estimate.level,
        outcome=estimate.outcome,
        detail="; ".join(part for part in (estimate.detail, *notes) if part),
        grad_sq=estimate.grad_sq,
        trace_cov=estimate.trace_cov,
        steps=steps,
        examples=examples,
        unit=circumstances.unit,
        source=circumstances.source,
        population=circumstances.population,
        parameters_seen=inventory.parameters_seen(group),
        skipped_steps=skipped,
        preconditioner=circumstances.preconditioner,
    )


def _notes(
    log: StepLog, inventory: Inventory, circumstances: Circumstances, *, measured: int
) -> list[str]:
    notes = [left_out(inventory), *circumstances.norm_notes]
    if circumstances.normalised:
        notes.append(normalised_unit(log.largest_unit))
    if circumstances.split_cost.passes:
        cost = circumstances.split_cost
        notes.append(
            f"{cost.passes} extra passes over {cost.examples} {circumstances.unit} took "
            f"{cost.seconds:.2g} s"
        )
    if circumstances.refused and measured:
        notes.append(
            f"{circumstances.refused} steps could not be measured: {circumstances.refusal}"
        )
    if log.unequal:
        notes.append(
            "passes of unequal size were taken to weigh alike; if the loop weighs them by their"
            " size, pass loss_reduction='sum'"
        )
    if log.restarts:
        notes.append("measuring started again when a parameter had to be left out")
    return notes


def normalised_unit(size: int) -> str:
    """Say what a unit is under BatchNorm in training mode."""
    return f"the unit is the normalised micro-batch of {size}"


def left_out(inventory: Inventory, limit: int = 3) -> str:
    """Name the first parameters left out, with their reasons."""
    missing = list(inventory.missing.items())
    if not missing:
        asked = sum(slot.asked for slot in inventory.slots)
        every = len(inventory.slots)
        return "" if asked == every else f"{asked} of {every} parameters were asked for"
    named = ", ".join(f"{name} ({reason})" for name, reason in missing[:limit])
    more = f" and {len(missing) - limit} more" if len(missing) > limit else ""
    return f"left out: {named}{more}"
