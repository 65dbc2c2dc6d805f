"""What ``noisescale sweep`` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from noisescale.records.serial import Record
from noisescale.records.sweep import Regimes, SweepCurve, TunedSteps
from noisescale.records.tradeoff import Tradeoff


@dataclass(frozen=True, kw_only=True)
class SettingSteps(Record):
    """What one setting took to one target, by first passage.

    Attributes:
        batch_size: global batch size.
        target: the goal.
        lr: learning rate.
        temperature: rate per example, as the optimizer means it: lr / ((1 - momentum) B), for
            Adam lr / sqrt(B).
        values: all hyper-parameters by name.
        steps: geometric mean over seeds, the upper median where a seed did not get there; None
            where most did not.
        seeds: runs.
        reached: runs that got there.
        closest: best value of the quantity at any evaluation; None if none was finite.
    """

    batch_size: int
    target: str
    lr: float
    temperature: float
    values: dict[str, Any]
    steps: float | None
    seeds: int
    reached: int
    closest: float | None


@dataclass(frozen=True, kw_only=True)
class SweepResult(Record):
    """Steps to target against batch size, everything tuned at each.

    Attributes:
        workload: the workload's name.
        optimizer: ``sgd``, ``momentum``, ``adam`` or as the recipe names it.
        unit: what batch sizes count.
        targets: goals, the first the one that ``batch_sizes`` is about.
        batch_sizes: tuned steps to the first target by first passage, smallest batch first.
        tradeoff: the steps law fitted to them; None where it could not be tried.
        regimes: the three regimes; None where it could not be tried.
        curves: the same for every target, by first passage and by sustained crossing.
        settings: what each setting took to each target.
        trials: trials behind it.
        outcomes: how many trials ended how.
        complete: whether the search was finished at every batch size.
        unfinished: batch sizes where it was not.
        seconds: wall time of this call.
        trial_seconds: sum over all trials of the time each took.
        store: folder that holds the trials; None where they were not kept.
        version: of noisescale.
        warnings: sentences.
    """

    workload: str
    optimizer: str
    unit: str
    targets: tuple[str, ...]
    batch_sizes: tuple[TunedSteps, ...]
    tradeoff: Tradeoff | None
    regimes: Regimes | None
    curves: tuple[SweepCurve, ...]
    settings: tuple[SettingSteps, ...]
    trials: int
    outcomes: dict[str, int]
    complete: bool
    unfinished: tuple[int, ...]
    seconds: float
    trial_seconds: float
    store: str | None
    version: str
    warnings: tuple[str, ...] = field(default=())
