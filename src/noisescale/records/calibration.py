"""The steps law from two or three tuned batch sizes and a noise scale."""

from __future__ import annotations

from dataclasses import dataclass

from noisescale.records.serial import Record
from noisescale.records.sweep import PredictedCurve, TunedSteps
from noisescale.records.tradeoff import Interval


@dataclass(frozen=True, kw_only=True)
class Calibration(Record):
    """What tuning at a few batch sizes says of all of them.

    Attributes:
        target: the goal.
        prior: where the noise scale put the critical batch, with its wider band.
        prior_basis: one sentence on where that comes from.
        tuned: what was tuned, smallest batch first.
        predicted: the whole curve; None where no tuned size reached the target.
        trials: trainings behind it.
        complete: False where time was up first.
        seconds: wall time of the tuning.
        detail: one sentence.
    """

    target: str
    prior: Interval
    prior_basis: str
    tuned: tuple[TunedSteps, ...]
    predicted: PredictedCurve | None
    trials: int
    complete: bool
    seconds: float
    detail: str
