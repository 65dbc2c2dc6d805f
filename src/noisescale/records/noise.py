"""What a measurement of the gradient noise scale says."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from noisescale.records.curvature import Curvature
from noisescale.records.serial import Record


class Outcome(enum.StrEnum):
    """How far a measurement got; an undetermined one is a result, not a failure."""

    DETERMINED = "determined"
    """The interval has two finite ends."""
    LOWER_BOUND = "lower_bound"
    """|G|^2 cannot be told from 0: the reported set is [low, infinity)."""
    TOO_FEW_STEPS = "too_few_steps"
    """No interval can be given from so few steps."""
    NOT_FINITE = "not_finite"
    """Every measured step held NaN or infinity."""
    UNSUPPORTED = "unsupported"
    """This source cannot measure here; ``detail`` says what, why and what to use instead."""


@dataclass(frozen=True, kw_only=True)
class ParametersSeen(Record):
    """Which trainable parameters a measurement covered.

    Attributes:
        seen: scalar parameters whose gradient was measured.
        total: trainable scalar parameters of the model.
        missing: names of the parameters left out.
    """

    seen: int
    total: int
    missing: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every trainable parameter was measured."""
        return not self.missing


@dataclass(frozen=True, kw_only=True)
class NoiseScale(Record):
    """The gradient noise scale tr(Sigma)/|G|^2 with its sampling interval.

    Attributes:
        b_simple: the ratio of the averages, in ``unit``; None unless determined.
        low: lower end of the interval, in ``unit``; None where none can be given.
        high: upper end, in ``unit``; None means unbounded when ``low`` is given.
        level: confidence level of the interval.
        outcome: how far the measurement got.
        detail: one sentence that explains the outcome or qualifies the unit.
        grad_sq: unbiased estimate of |G|^2 (may be negative: it is never clamped).
        trace_cov: unbiased estimate of the trace of the per-unit gradient covariance.
        steps: optimizer steps (or draws at frozen weights) that entered.
        examples: examples that entered, counted in ``unit``.
        unit: ``examples`` or ``sequences`` or ``tokens``.
        source: ``examples``, ``microbatches`` or ``ranks``.
        population: ``infinite`` or ``train_set``.
        parameters_seen: which parameters were covered.
        skipped_steps: measured steps left out because they were not finite.
        preconditioner: the norm of gradients: ``none`` for plain squares, else the optimizer
            whose second moments divide them (``adam``, ``rmsprop``), with its options.
    """

    b_simple: float | None
    low: float | None
    high: float | None
    level: float = 0.95
    outcome: Outcome
    detail: str = ""
    grad_sq: float | None
    trace_cov: float | None
    steps: int
    examples: int
    unit: str = "examples"
    source: str
    population: str = "infinite"
    parameters_seen: ParametersSeen
    skipped_steps: int = 0
    preconditioner: str = "none"


@dataclass(frozen=True, kw_only=True)
class TrajectoryRow(Record):
    """The noise scale over one window of a training run.

    Attributes:
        step: optimizer steps done at the window's end.
        examples: examples seen at the window's end, in the run's unit.
        loss: mean training loss over the window.
        grad_sq: window mean of |G|^2.
        trace_cov: window mean of tr(Sigma).
        b_simple: their ratio; None unless determined.
        low: lower end of the window's interval.
        high: upper end; None means unbounded when ``low`` is given.
    """

    step: int
    examples: int
    loss: float | None
    grad_sq: float | None
    trace_cov: float | None
    b_simple: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Measurement(Record):
    """What ``noisescale measure`` returns.

    Attributes:
        workload: the name it was asked for by.
        noise_scale: the measurement over the whole run.
        groups: the same per parameter group.
        trajectory: windows along the run, oldest first.
        batch_size: global batch size of the run, in the noise scale's unit.
        lr: the learning rate of the run; None at frozen weights.
        frozen: whether the weights were held still.
        seconds: wall time.
        warnings: what a reader must know besides, one sentence each.
        curvature: the Hessian's largest eigenvalue along the run; None unless asked for.
    """

    workload: str
    noise_scale: NoiseScale
    groups: dict[str, NoiseScale]
    trajectory: tuple[TrajectoryRow, ...]
    batch_size: int
    lr: float | None
    frozen: bool
    seconds: float
    warnings: tuple[str, ...] = ()
    curvature: Curvature | None = None
