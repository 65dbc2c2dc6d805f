"""How fast a training step is, and how much memory it takes, at each micro-batch size."""

from __future__ import annotations

from dataclasses import dataclass

from noisescale.records.serial import Record


@dataclass(frozen=True, kw_only=True)
class SpeedPoint(Record):
    """One micro-batch size that was really run.

    Attributes:
        micro_batch_size: examples per pass.
        seconds_per_step: median of a whole step: fetch the data, forward, backward, update.
        seconds_low: lower quartile of the repeats.
        seconds_high: upper quartile of the repeats.
        data_seconds: median wait for the batch, part of ``seconds_per_step``.
        compute_seconds: median of the rest.
        examples_per_second: micro_batch_size / seconds_per_step.
        peak_bytes: peak memory above the baseline (model, data and program loaded), in bytes.
        repeats: timed steps behind the medians.
    """

    micro_batch_size: int
    seconds_per_step: float
    seconds_low: float
    seconds_high: float
    data_seconds: float
    compute_seconds: float
    examples_per_second: float
    peak_bytes: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class SpeedFailure(Record):
    """One micro-batch size that does not fit.

    Attributes:
        micro_batch_size: examples per pass.
        reason: one sentence: out of memory, over the limit, killed, collapsed throughput.
    """

    micro_batch_size: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class SpeedCurve(Record):
    """A scan over micro-batch sizes.

    Attributes:
        points: sizes that ran and fit, smallest first.
        failures: sizes that were tried and do not fit.
        limit_bytes: memory that may be used above the baseline, the margin taken off.
        baseline_bytes: memory of the loaded program, model and data, in bytes.
        margin: share of the available memory kept free.
        device: what it ran on, for people.
        stopped: why the scan stopped: ``largest size``, ``does not fit``, ``time``.
        not_probed: what the probe did not cover, one sentence each.
        unit: what is counted: ``examples`` or ``sequences``.
    """

    points: tuple[SpeedPoint, ...]
    failures: tuple[SpeedFailure, ...]
    limit_bytes: int
    baseline_bytes: int
    margin: float
    device: str
    stopped: str
    not_probed: tuple[str, ...] = ()
    unit: str = "examples"


@dataclass(frozen=True, kw_only=True)
class MemoryLimit(Record):
    """The largest micro-batch that fits.

    Attributes:
        micro_batch_size: largest size that was run and fits; None when none did.
        peak_bytes: its peak above the baseline.
        limit_bytes: what may be used above the baseline.
        largest_tested: largest size that was run, whether it fits or not.
    """

    micro_batch_size: int | None
    peak_bytes: int | None
    limit_bytes: int
    largest_tested: int


@dataclass(frozen=True, kw_only=True)
class ThroughputKnee(Record):
    """The smallest micro-batch size from which more examples per pass stop to pay.

    Attributes:
        micro_batch_size: smallest tested size with at least 90 % of the best throughput.
        examples_per_second: throughput there.
        data_bound: whether waiting for data takes more than half of the step there.
    """

    micro_batch_size: int
    examples_per_second: float
    data_bound: bool = False
