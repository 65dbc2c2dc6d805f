"""What ``noisescale branch`` returns: critical batch sizes measured along a training."""

from __future__ import annotations

from dataclasses import dataclass

from noisescale.records.serial import Record
from noisescale.records.tradeoff import Interval


@dataclass(frozen=True, kw_only=True)
class BranchRow(Record):
    """Short runs at one multiple of the batch size.

    Attributes:
        factor: k, the batch size over that of the training.
        batch_size: global batch size.
        lr: converted learning rate.
        steps: optimizer steps of each run; their examples are the same for every factor.
        loss: mean over seeds of the loss at the end; None where a run diverged.
        excess: mean over seeds of the loss above that of the run at k = 1 of the same seed.
        low: lower end of the interval of ``excess``; None where it is not known.
        high: upper end likewise.
        seeds: runs.
        verdict: ``within`` the tolerance, ``beyond`` it, ``unclear`` where the interval holds it,
            or ``diverged``.
    """

    factor: int
    batch_size: int
    lr: float
    steps: int
    loss: float | None
    excess: float | None
    low: float | None
    high: float | None
    seeds: int
    verdict: str


@dataclass(frozen=True, kw_only=True)
class BranchPoint(Record):
    """The critical batch size at one point of a training.

    Attributes:
        step: optimizer steps of the training before the branches; None for a file.
        examples: examples before them, in ``unit`` of the result; None for a file.
        loss: where the branches start.
        critical_batch: largest batch that keeps the loss, and so do all smaller ones; the point
            is the geometric mean of it and of the next one tried, the ends account for the noise
            of seeds. An open upper end: none tried was surely too large.
        rows: one per factor, ascending; the first is the training's own batch size.
        detail: one sentence.
    """

    step: int | None
    examples: int | None
    loss: float
    critical_batch: Interval
    rows: tuple[BranchRow, ...]
    detail: str


@dataclass(frozen=True, kw_only=True)
class BranchResult(Record):
    """What ``noisescale branch`` returns.

    Attributes:
        workload: the workload's name.
        optimizer: ``sgd``, ``momentum``, ``adam``, ...
        unit: what batch sizes count.
        batch_size: of the training.
        lr: of the training.
        rule: how rates are converted: ``linear`` or ``square_root``.
        quantity: ``train_loss`` or ``validation_loss``.
        tolerance: loss that may be lost.
        examples: of each branch.
        level: confidence level of the intervals.
        basis: ``branch``.
        points: along the training.
        checkpoint: file that the branches start from; None where the training was done here.
        seconds: wall time.
        version: of noisescale.
    """

    workload: str
    optimizer: str
    unit: str
    batch_size: int
    lr: float
    rule: str
    quantity: str
    tolerance: float
    examples: int
    level: float
    points: tuple[BranchPoint, ...]
    checkpoint: str | None
    seconds: float
    version: str
    basis: str = "branch"
