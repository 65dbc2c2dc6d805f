"""From a measured noise scale to a critical batch, with the error of taking one for the other.

The noise scale is not the critical batch: the steps law has its own Bcrit, and momentum and
Adam move it. What stands between them is one factor per optimizer with its spread over
workloads; the spread is the model error, and the wider band carries it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from noisescale.errors import InvalidInputError, nearest
from noisescale.records import CriticalBatch, NoiseScale, Outcome, PredictedCurve


@dataclass(frozen=True, kw_only=True)
class OptimizerFactor:
    """Critical batch over pooled online noise scale, for one kind of optimizer.

    Attributes:
        point: geometric mean over workloads.
        low: lower end of the spread.
        high: upper end of the spread.
        source: where it comes from.
    """

    point: float
    low: float
    high: float
    source: str


_TUNED = (
    "tuned steps to target of eight workloads (digits, MNIST and CIFAR-10 MLPs and CNNs, a teacher,"
    " shifted patches): benchmarks/optimizer_factor.py and benchmarks/advice_check.py"
)

FACTORS = {
    # measured: rows from 0.74 to 2.24, geometric mean over workloads 1.21; a factor of 2 either way
    "sgd": OptimizerFactor(point=1.2, low=0.6, high=2.4, source=_TUNED),
    # measured at m = 0.9: rows from 1.11 to 3.32, geometric mean 1.79; a factor of 2 either way
    "momentum": OptimizerFactor(point=1.8, low=0.9, high=3.6, source=_TUNED),
    # assumed: small MLPs and one character GPT read 3 to 8 times too low; no benchmark here yet
    "adam": OptimizerFactor(
        point=4.5,
        low=2.1,
        high=9.6,
        source="assumed from earlier trials on small MLPs and one character GPT, not yet repeated",
    ),
}


def critical_batch(
    *,
    noise: NoiseScale,
    optimizer: str,
    phase: str,
    factor: OptimizerFactor | None = None,
) -> CriticalBatch:
    """Turn a noise scale into a critical batch with two nested bands.

    The point is factor x B_simple. The sampling band is the factor times the noise scale's
    interval. The wider band adds the factor's spread: the two are independent, so their
    half-widths add in quadrature on the log scale. For a lower bound the wider band starts
    at the noise scale's low times the factor's low.

    Args:
        noise: pooled over the part of the training that ``phase`` names.
        optimizer: ``sgd``, ``momentum`` or ``adam``.
        phase: for people.
        factor: default: the one measured for this optimizer.

    Returns:
        The critical batch, basis ``noise_scale``, in the noise scale's unit.

    Raises:
        InvalidInputError: the optimizer is unknown.

    Source: McCandlish et al. 2018, sec. 2.3 (B_simple predicts Bcrit within a factor); the
    factors are measured by benchmarks/optimizer_factor.py.
    """
    if factor is None:
        if optimizer not in FACTORS:
            raise InvalidInputError(
                f"optimizer {optimizer!r}", "no factor is known", nearest(optimizer, FACTORS)
            )
        factor = FACTORS[optimizer]
    sampling = (_scaled(noise.low, factor.point), _scaled(noise.high, factor.point))
    low, high = _scaled(noise.low, factor.low), None
    if noise.outcome is Outcome.DETERMINED and noise.b_simple is not None:
        low, high = _wider(noise, factor)
    return CriticalBatch(
        point=_scaled(noise.b_simple, factor.point),
        low=low,
        high=high,
        sampling_low=sampling[0],
        sampling_high=sampling[1],
        basis="noise_scale",
        phase=phase,
        outcome=noise.outcome,
        detail=noise.detail,
        optimizer=optimizer,
        factor=factor.point,
        factor_low=factor.low,
        factor_high=factor.high,
        factor_source=factor.source,
        unit=noise.unit,
    )


def calibrated(critical: CriticalBatch, *, curve: PredictedCurve) -> CriticalBatch:
    """Return the critical batch that tuned runs gave, in place of the noise scale's alone.

    Args:
        critical: from the noise scale; its unit and optimizer are kept.
        curve: the steps law from tuned batch sizes and the noise scale together; its interval is
            both bands, since tuned runs measure the critical batch itself.
    """
    found = curve.critical_batch
    tuned = " and ".join(f"{size:,.0f}" for size in curve.tuned)
    return dataclasses.replace(
        critical,
        point=found.point,
        low=found.low,
        high=found.high,
        sampling_low=found.low,
        sampling_high=found.high,
        basis="tradeoff",
        phase=f"tuned at batch size {tuned}",
        outcome=Outcome.DETERMINED,
        detail=curve.detail,
        factor=1.0,
        factor_low=1.0,
        factor_high=1.0,
        factor_source="none: tuned runs measure the critical batch itself",
    )


def withheld(critical: CriticalBatch, *, why: str) -> CriticalBatch:
    """Return the same without its numbers, for a measurement that says nothing about training.

    Args:
        critical: what was measured.
        why: one sentence without its full stop.
    """
    known = critical.outcome in (Outcome.DETERMINED, Outcome.LOWER_BOUND)
    return dataclasses.replace(
        critical,
        point=None,
        low=None,
        high=None,
        sampling_low=None,
        sampling_high=None,
        outcome=Outcome.UNSUPPORTED if known else critical.outcome,
        detail=why,
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _wider(noise: NoiseScale, factor: OptimizerFactor) -> tuple[float, float]:
    assert noise.b_simple is not None
    assert noise.low is not None
    assert noise.high is not None
    point = noise.b_simple * factor.point
    down = math.hypot(_log_ratio(noise.b_simple, noise.low), math.log(factor.point / factor.low))
    up = math.hypot(_log_ratio(noise.high, noise.b_simple), math.log(factor.high / factor.point))
    return point * math.exp(-down), point * math.exp(up)


def _log_ratio(larger: float, smaller: float) -> float:
    return math.log(larger / smaller) if smaller > 0 else math.inf
