"""The largest curvature along a training."""

from __future__ import annotations

from dataclasses import dataclass

from noisescale.records.serial import Record


@dataclass(frozen=True, kw_only=True)
class CurvaturePoint(Record):
    """One look at the Hessian's largest eigenvalue.

    Attributes:
        step: optimizer steps done before it.
        value: the eigenvalue, in loss per squared weight, or per squared preconditioned weight.
        residual: some eigenvalue lies within this distance of ``value``.
    """

    step: int
    value: float
    residual: float


@dataclass(frozen=True, kw_only=True)
class Curvature(Record):
    """The largest eigenvalue of the training loss's Hessian along a run.

    Attributes:
        upper: its quantile ``quantile`` over the steps: what a stable rate must stand.
        median: over the steps.
        largest: of all looks.
        quantile: which quantile ``upper`` is.
        preconditioner: ``none``, or ``adam`` where the Hessian is divided as the optimizer
            divides gradients.
        examples: training examples behind each look.
        points: the looks, oldest first.
    """

    upper: float
    median: float
    largest: float
    quantile: float
    preconditioner: str
    examples: int
    points: tuple[CurvaturePoint, ...]
