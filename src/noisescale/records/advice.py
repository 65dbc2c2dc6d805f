"""What ``noisescale advise`` returns: three limits, a table, one recommendation, reasons."""

from __future__ import annotations

from dataclasses import dataclass

from noisescale.records.calibration import Calibration
from noisescale.records.noise import NoiseScale, Outcome, TrajectoryRow
from noisescale.records.recipe import Recipe
from noisescale.records.serial import Record
from noisescale.records.speed import MemoryLimit, SpeedCurve, ThroughputKnee


@dataclass(frozen=True, kw_only=True)
class CriticalBatch(Record):
    """The batch size at which steps are twice the fewest and examples twice the fewest.

    Two nested bands: the sampling interval of the measurement, and the wider one that adds
    the model error of taking it for a critical batch. Decisions inherit the wider one.

    Attributes:
        point: best single value, in ``unit``; None unless determined.
        low: lower end of the wider band; None where none can be given.
        high: upper end of the wider band; None means unbounded when ``low`` is given.
        sampling_low: lower end of the sampling band.
        sampling_high: upper end of the sampling band.
        basis: ``noise_scale``, ``tradeoff`` or ``branch``.
        phase: the part of the training it was measured on, for people.
        outcome: how far the measurement got.
        detail: one sentence that explains the outcome.
        optimizer: ``sgd``, ``momentum`` or ``adam``.
        factor: what the noise scale was multiplied by for this optimizer.
        factor_low: lower end of the factor's spread over workloads.
        factor_high: upper end of the factor's spread over workloads.
        factor_source: where the factor comes from.
        unit: what it counts.
    """

    point: float | None
    low: float | None
    high: float | None
    sampling_low: float | None
    sampling_high: float | None
    basis: str
    phase: str
    outcome: Outcome
    detail: str = ""
    optimizer: str
    factor: float
    factor_low: float
    factor_high: float
    factor_source: str
    unit: str = "examples"


@dataclass(frozen=True, kw_only=True)
class RateTrial(Record):
    """One short run of the rate check.

    Attributes:
        lr: its learning rate.
        seed: its seed.
        steps_to_target: steps until the target was passed; None when it was not.
        final_loss: training loss at its end; None when it was not finite.
        outcome: ``reached``, ``not_reached`` or ``diverged``.
    """

    lr: float
    seed: int
    steps_to_target: float | None
    final_loss: float | None
    outcome: str


@dataclass(frozen=True, kw_only=True)
class RateCheck(Record):
    """Whether the recipe's learning rate is near its best.

    Attributes:
        lr: the recipe's rate.
        best_lr: the best of the rates tried; None when every run failed.
        verdict: ``near_best``, ``too_low``, ``too_high`` or ``unclear``.
        detail: one sentence for people.
        measured_lr: the rate at which the noise scale was measured.
        trials: every short run.
        b_simple_at_lr: what the recipe's own rate would have read, in the run's unit;
            None when it was the one measured or was not determined.
    """

    lr: float
    best_lr: float | None
    verdict: str
    detail: str
    measured_lr: float
    trials: tuple[RateTrial, ...]
    b_simple_at_lr: float | None = None


@dataclass(frozen=True, kw_only=True)
class AdviceRow(Record):
    """One global batch size: what it costs.

    Attributes:
        global_batch_size: examples per optimizer step.
        micro_batch_size: examples per pass.
        accumulation: passes per step on one device.
        replicas: devices.
        steps_ratio: S/Smin = 1 + Bcrit/B at the point estimate; None when there is none.
        steps_ratio_low: the same at the lower end of the wider band.
        steps_ratio_high: the same at its upper end.
        examples_ratio: E/Emin = 1 + B/Bcrit at the point estimate.
        examples_ratio_low: the same at the upper end of the wider band.
        examples_ratio_high: the same at its lower end: the waste that is judged.
        seconds_per_step: measured seconds of one optimizer step.
        relative_time: time to target over the best row's; None without a point estimate.
        relative_time_low: lower end over the wider band.
        relative_time_high: upper end over the wider band.
        allowed: whether its waste stays within the limit at the judged end.
    """

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    replicas: int
    steps_ratio: float | None
    steps_ratio_low: float | None
    steps_ratio_high: float | None
    examples_ratio: float | None
    examples_ratio_low: float | None
    examples_ratio_high: float | None
    seconds_per_step: float
    relative_time: float | None
    relative_time_low: float | None
    relative_time_high: float | None
    allowed: bool


@dataclass(frozen=True, kw_only=True)
class Limits(Record):
    """The three limits side by side.

    Attributes:
        memory: what fits.
        throughput_knee: where throughput stops to grow; None when nothing ran.
        critical_batch: where more examples per step stop to save steps.
    """

    memory: MemoryLimit
    throughput_knee: ThroughputKnee | None
    critical_batch: CriticalBatch


@dataclass(frozen=True, kw_only=True)
class Advice(Record):
    """The answer to "what batch size should I use?".

    Attributes:
        workload: the name it was asked for by.
        recipe: the recipe that was measured.
        target: the goal, as text; None when the workload has none.
        unit: what batch sizes count.
        limits: the three limits.
        rate_check: whether the recipe's rate is near its best.
        table: one row per global batch size, smallest first.
        recommended: one row of the table, or None with the reason in ``reasons``.
        reasons: why, one sentence each, the most important first.
        max_waste: E/Emin that the user accepts.
        devices: numbers of replicas asked for.
        speed: the scan behind memory and knee.
        noise_scale: the measurement behind the critical batch, pooled over one or more runs.
        trajectory: the noise scale along the first of them.
        groups: the noise scale per parameter group, first run.
        first: the noise scale over the first quarter of the first run.
        last: the noise scale over the last quarter of the first run.
        warnings: what a reader must know besides, one sentence each.
        seconds: wall time of the whole command.
        version: version of noisescale.
        calibration: tuned runs at two or three batch sizes, which the critical batch rests on
            then; None where they were not asked for.
    """

    workload: str
    recipe: Recipe
    target: str | None
    unit: str
    limits: Limits
    rate_check: RateCheck
    table: tuple[AdviceRow, ...]
    recommended: AdviceRow | None
    reasons: tuple[str, ...]
    max_waste: float
    devices: tuple[int, ...]
    speed: SpeedCurve
    noise_scale: NoiseScale
    trajectory: tuple[TrajectoryRow, ...]
    groups: dict[str, NoiseScale]
    first: NoiseScale | None
    last: NoiseScale | None
    warnings: tuple[str, ...]
    seconds: float
    version: str
    calibration: Calibration | None = None
