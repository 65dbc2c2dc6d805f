"""What a sweep found: tuned steps per batch size, the steps law, regimes and the best rate."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from noisescale.records.serial import Record
from noisescale.records.tradeoff import Interval, Tradeoff
from noisescale.records.trial import TrialOutcome

NOTHING = Interval(point=None, low=None, high=None)


@dataclass(frozen=True, kw_only=True)
class TrialRow(Record):
    """What one trial says of one target: a row of the table that the analysis takes.

    Attributes:
        batch_size: global batch size.
        values: the trial's hyper-parameters by name; numbers are searched, words are families.
        seed: name of the seed; trials that share it share the initial weights and the order of
            the data, at one batch size.
        outcome: how the trial ended as far as this target is concerned.
        steps: optimizer steps to the target where reached; else the steps that were run.
        closest: best value of the quantity that was seen.
    """

    batch_size: int
    values: dict[str, Any]
    seed: str
    outcome: TrialOutcome
    steps: float
    closest: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrialCurve(Record):
    """The evaluations of one trial.

    Attributes:
        batch_size: global batch size.
        values: the trial's hyper-parameters by name.
        seed: name of the seed.
        outcome: how the trial ended, apart from any target.
        steps: optimizer steps that were done.
        evaluated_at: steps done at each evaluation, ascending.
        metrics: by quantity, its value at each evaluation; None where not finite.
    """

    batch_size: int
    values: dict[str, Any]
    seed: str
    outcome: TrialOutcome
    steps: int
    evaluated_at: tuple[int, ...]
    metrics: dict[str, tuple[float | None, ...]]


class TuningOutcome(enum.StrEnum):
    """How the tuning at one batch size ended."""

    REACHED = "reached"
    """The best point lies inside what was tried."""
    EDGE = "edge"
    """The best point lies on an edge of what was tried: the tuned steps may be fewer."""
    NOT_REACHED = "not_reached"
    """No point reached the target with half of its seeds: the steps are a lower bound."""
    DIVERGED = "diverged"
    """Every trial diverged."""
    NOTHING_RAN = "nothing_ran"
    """No trial ended by itself: crashes, interruptions, no memory."""


@dataclass(frozen=True, kw_only=True)
class TunedSteps(Record):
    """Steps to one target at one batch size, every hyper-parameter tuned.

    The estimand is the smallest, over hyper-parameters, of the median over seeds of the steps.

    Attributes:
        batch_size: global batch size.
        steps: the estimate; None where the target was not reached.
        low: lower end of the interval; for a target not reached the steps run without reaching
            it, None where the seeds give no interval.
        high: upper end; None where there is none.
        outcome: how the tuning ended.
        best: hyper-parameters of the best point tried, by name.
        target: as :class:`~noisescale.Target` spells it.
        crossing: ``first`` passage or ``sustained``.
        log_error: standard error of log(steps); None where it is not known.
        freedom: degrees of freedom of ``log_error``; None for many.
        optimum: searched hyper-parameters at the minimum of the smooth model, between the
            points tried; empty where there is no model.
        temperature: lr / ((1 - momentum) B) at the best point; None without a rate.
        points: hyper-parameter points that say something (not only failures).
        seeds: seeds at the best point.
        trials: trials behind the row.
        reached: trials that reached the target.
        not_reached: trials that ended before it (budget or race).
        diverged: trials that diverged.
        failed: crashed, interrupted or too large for the memory.
        on_edge: hyper-parameters whose best value is the smallest or largest tried.
        closest: best value of the quantity over all trials.
        seed_values: by seed, what log(steps) would be by that seed alone.
        detail: one sentence where something is to be said.
    """

    batch_size: int
    steps: float | None
    low: float | None
    high: float | None
    outcome: TuningOutcome
    best: dict[str, Any]
    target: str = ""
    crossing: str = "first"
    log_error: float | None = None
    freedom: float | None = None
    optimum: dict[str, float] = field(default_factory=dict)
    temperature: float | None = None
    points: int = 0
    seeds: int = 0
    trials: int = 0
    reached: int = 0
    not_reached: int = 0
    diverged: int = 0
    failed: int = 0
    on_edge: tuple[str, ...] = ()
    closest: float | None = None
    seed_values: dict[str, float] = field(default_factory=dict)
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Regimes(Record):
    """Three straight pieces of log steps against log batch size: slope -1, a slope, slope 0.

    Attributes:
        perfect_end: batch size at which steps stop to fall in proportion.
        useful_end: batch size from which steps do not fall any more.
        examples: examples to the target in the perfect regime (batch size times steps).
        plateau: steps to the target in the flat regime.
        middle_slope: slope of log steps between the two ends, in [-1, 0].
        small_slope: slope fitted freely to the sizes below the end of perfect scaling (-1 is
            expected); nothing where fewer than three such sizes were run.
        rms_log_error: root mean square of log(steps) about the three pieces.
        level: confidence level of the intervals.
        detail: one sentence.
    """

    perfect_end: Interval
    useful_end: Interval
    examples: Interval
    plateau: Interval
    middle_slope: float | None
    small_slope: Interval
    rms_log_error: float | None
    level: float
    detail: str


@dataclass(frozen=True, kw_only=True)
class RateLaw(Record):
    """Best rate against batch size: lr = lr_max / (1 + Bn/B)^p.

    Attributes:
        exponent: p, the exponent of the best rate at small batch sizes.
        saturation: Bn, the batch size where the rate stops to follow its power law.
        rate_max: lr_max, the rate at very large batch.
        rms_log_error: root mean square of log(rate) about the law.
        sizes: batch sizes used.
        left_out: batch sizes whose best rate lay on an edge of what was tried.
        level: confidence level of the intervals.
        detail: one sentence.
    """

    exponent: Interval
    saturation: Interval
    rate_max: Interval
    rms_log_error: float | None
    sizes: int
    left_out: tuple[int, ...]
    level: float
    detail: str


@dataclass(frozen=True, kw_only=True)
class SweepCurve(Record):
    """Everything that a sweep says of one target and one definition of reaching it.

    Attributes:
        target: as :class:`~noisescale.Target` spells it.
        crossing: ``first`` or ``sustained``.
        batch_sizes: tuned steps, smallest batch first.
        tradeoff: the steps law fitted to them; None where it could not be tried.
        regimes: the three regimes; None where it could not be tried.
        rate_law: best rate against batch size; None where it could not be tried.
        detail: one sentence where something is to be said.
    """

    target: str
    crossing: str
    batch_sizes: tuple[TunedSteps, ...]
    tradeoff: Tradeoff | None
    regimes: Regimes | None
    rate_law: RateLaw | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class PredictedSteps(Record):
    """Steps predicted at one batch size.

    Attributes:
        batch_size: global batch size.
        steps: the median.
        low: lower end of the band.
        high: upper end.
        measured: whether the batch size is one of the tuned ones.
    """

    batch_size: float
    steps: float
    low: float
    high: float
    measured: bool


@dataclass(frozen=True, kw_only=True)
class PredictedCurve(Record):
    """The steps law from a few tuned batch sizes and a noise scale together.

    Attributes:
        curve: predicted steps, smallest batch first.
        critical_batch: Bcrit, with what was measured.
        steps_min: fewest steps.
        examples_min: fewest examples.
        brackets: whether tuned sizes lie on both sides of the critical batch, as far as the
            data tell.
        next_batch_size: the size to tune next so that they do; None where they do already, or
            where no allowed size would.
        tuned: batch sizes behind the prediction.
        level: share of tuned steps that the band is to hold.
        detail: one sentence.
    """

    curve: tuple[PredictedSteps, ...]
    critical_batch: Interval
    steps_min: Interval
    examples_min: Interval
    brackets: bool
    next_batch_size: int | None
    tuned: tuple[float, ...]
    level: float
    detail: str


@dataclass(frozen=True, kw_only=True)
class CollapseRow(Record):
    """One point of the plot of a metric against rate and temperature.

    Attributes:
        batch_size: global batch size.
        rate: effective learning rate lr/(1 - m).
        temperature: tau = lr / ((1 - m) B).
        metric: the metric, median over seeds.
        seeds: seeds behind it.
    """

    batch_size: int
    rate: float
    temperature: float
    metric: float
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Collapse(Record):
    """How well curves of several batch sizes fall on one when drawn against temperature.

    Attributes:
        rows: the points, by batch size, then rate.
        rate_mismatch: mean distance of each curve's points from the other curves, drawn against
            the rate, over the metric's spread; None where curves do not overlap.
        temperature_mismatch: the same drawn against temperature.
        optimum_rate_exponent: slope of the log best rate against log B: 1 where the best
            temperature is the same at all sizes, 0 where the best rate is.
        collapses: whether temperature draws the curves closer together than the rate.
    """

    rows: tuple[CollapseRow, ...]
    rate_mismatch: float | None
    temperature_mismatch: float | None
    optimum_rate_exponent: float | None
    collapses: bool | None


@dataclass(frozen=True, kw_only=True)
class Compared(Record):
    """One sweep beside another.

    Attributes:
        name: of the optimizer, or whatever was varied.
        against: what it is compared with.
        steps_min: ratio of the fewest steps.
        examples_min: ratio of the fewest examples.
        critical_batch: ratio of the critical batches.
    """

    name: str
    against: str
    steps_min: Interval
    examples_min: Interval
    critical_batch: Interval


@dataclass(frozen=True, kw_only=True)
class EqualBudget(Record):
    """The best metric at one batch size within one budget.

    Attributes:
        batch_size: global batch size.
        kind: ``steps``, ``examples`` or ``epochs``.
        budget: how many.
        metric: best over hyper-parameters of the median over seeds; None where nothing was
            evaluated within the budget.
        low: least over the seeds of the best point.
        high: greatest over them.
        best: hyper-parameters of the best point.
        seeds: seeds of the best point.
        whole: whether every trial ran to the end of the budget or diverged.
    """

    batch_size: int
    kind: str
    budget: float
    metric: float | None
    low: float | None
    high: float | None
    best: dict[str, Any]
    seeds: int
    whole: bool


@dataclass(frozen=True, kw_only=True)
class TimeToTarget(Record):
    """Wall time to the target at one batch size.

    Attributes:
        batch_size: global batch size.
        micro_batch_size: examples per pass.
        accumulation: passes per step on each device.
        replicas: devices.
        seconds_per_step: time of a step.
        seconds: time to the target; None where its steps are not known.
        low: lower end of the interval.
        high: upper end.
    """

    batch_size: int
    micro_batch_size: int
    accumulation: int
    replicas: int
    seconds_per_step: float
    seconds: float | None
    low: float | None
    high: float | None
