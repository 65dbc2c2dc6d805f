"""The steps law fitted to batch sizes and steps to target."""

from __future__ import annotations

from dataclasses import dataclass

from noisescale.records.noise import Outcome
from noisescale.records.serial import Record


@dataclass(frozen=True, kw_only=True)
class Interval(Record):
    """A value with its interval.

    Attributes:
        point: the estimate; None where none exists.
        low: lower end.
        high: upper end; None means unbounded when ``low`` is given.
    """

    point: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class FitQuality(Record):
    """How well S = Smin (1 + Bcrit/B) describes the data.

    Attributes:
        points: rows that reached the target.
        censored: rows that did not (their steps are lower bounds).
        batch_sizes: distinct batch sizes.
        rms_log_error: root mean square of log(steps) - log(fit) over the reached rows.
        replication_error: the same over repeats at equal batch size; None without repeats.
        lack_of_fit_p: p-value of the F test of lack of fit; None without repeats.
        brackets: whether the data lie on both sides of the critical batch.
    """

    points: int
    censored: int
    batch_sizes: int
    rms_log_error: float
    replication_error: float | None
    lack_of_fit_p: float | None
    brackets: bool


@dataclass(frozen=True, kw_only=True)
class Tradeoff(Record):
    """What ``noisescale tradeoff`` returns.

    Attributes:
        steps_min: fewest steps to the target, reached at very large batch.
        examples_min: fewest examples to the target, reached at very small batch, in ``unit``.
        critical_batch: Bcrit = examples_min / steps_min, in ``unit``.
        level: confidence level of the intervals.
        outcome: determined, or how far the fit got.
        detail: one sentence that explains the outcome.
        fit: how well the law describes the data.
        overhead_batch: the other definition of a critical batch: the size that takes 1.2 times
            the examples of the smallest tested size that reached the target, in ``unit``.
        target: the target's name where the file holds one.
        unit: what batch sizes count.
    """

    steps_min: Interval
    examples_min: Interval
    critical_batch: Interval
    level: float
    outcome: Outcome
    detail: str
    fit: FitQuality
    overhead_batch: Interval = Interval(point=None, low=None, high=None)
    target: str | None = None
    unit: str = "examples"
