"""Steps against examples: the steps law S = Smin (1 + Bcrit/B), and its fit with intervals.

Two definitions of a critical batch stand side by side: Bcrit of the law (twice the fewest steps
*and* twice the fewest examples) and the overhead-r size, which depends on the size it is
compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError
from noisescale.records import FitQuality, Interval, Outcome, Tradeoff
from noisescale.theory.runs_checked import checked_runs, positive
from noisescale.theory.steps_likelihood import LogInterval, StepsLikelihood, profile_intervals
from noisescale.theory.tradeoff_detail import explain

Array = npt.NDArray[np.float64]

MIN_SIZES = 3
"""Distinct batch sizes that must have reached the target: two parameters and one to check."""
MIN_POINTS = 4
"""Rows that must have reached the target: two degrees of freedom left for the noise."""


def steps_ratio(*, batch_size: npt.ArrayLike, critical_batch: float) -> Array:
    """Steps over the fewest steps: S/Smin = 1 + Bcrit/B.

    Args:
        batch_size: B, any shape, in the unit of ``critical_batch``; positive.
        critical_batch: Bcrit; positive.

    Returns:
        S/Smin, above 1, shape of ``batch_size``.

    Raises:
        InvalidInputError: a size is not positive and finite.

    Source: McCandlish et al. 2018, eq. 2.11 solved for S.

    >>> float(steps_ratio(batch_size=50, critical_batch=100))
    3.0
    """
    return 1 + positive("critical_batch", critical_batch) / positive("batch_size", batch_size)


def examples_ratio(*, batch_size: npt.ArrayLike, critical_batch: float) -> Array:
    """Examples over the fewest examples, the waste of a batch size: E/Emin = 1 + B/Bcrit.

    Args:
        batch_size: B, any shape, in the unit of ``critical_batch``; positive.
        critical_batch: Bcrit; positive.

    Returns:
        E/Emin, above 1, shape of ``batch_size``.

    Raises:
        InvalidInputError: a size is not positive and finite.

    Source: McCandlish et al. 2018, eq. 2.11 solved for E.

    >>> float(examples_ratio(batch_size=50, critical_batch=100))
    1.5
    """
    return 1 + positive("batch_size", batch_size) / positive("critical_batch", critical_batch)


def batch_size_for_steps(*, ratio: npt.ArrayLike, critical_batch: float) -> Array:
    """Batch size that takes ``ratio`` times the fewest steps: B = Bcrit/(ratio - 1).

    Args:
        ratio: S/Smin, above 1 (the fewest steps need an infinite batch).
        critical_batch: Bcrit; positive.

    Returns:
        B in the unit of ``critical_batch``.

    Raises:
        InvalidInputError: a ratio is not above 1.

    Source: McCandlish et al. 2018, eq. 2.11, the inverse of :func:`steps_ratio`.

    >>> float(batch_size_for_steps(ratio=3.0, critical_batch=100))
    50.0
    """
    return positive("critical_batch", critical_batch) / _excess("ratio", ratio)


def batch_size_for_examples(*, ratio: npt.ArrayLike, critical_batch: float) -> Array:
    """Batch size that takes ``ratio`` times the fewest examples: B = Bcrit (ratio - 1).

    Args:
        ratio: E/Emin, above 1 (the fewest examples need a vanishing batch).
        critical_batch: Bcrit; positive.

    Returns:
        B in the unit of ``critical_batch``.

    Raises:
        InvalidInputError: a ratio is not above 1.

    Source: McCandlish et al. 2018, eq. 2.11, the inverse of :func:`examples_ratio`.

    >>> float(batch_size_for_examples(ratio=1.5, critical_batch=100))
    50.0
    """
    return positive("critical_batch", critical_batch) * _excess("ratio", ratio)


OVERHEAD = 1.2
"""Examples over those of the smallest tested size at which the overhead definition is shown
(paper: Zhang et al. 2024 take 20 %)."""


def overhead_batch_size(
    *, critical_batch: float, base_batch_size: npt.ArrayLike, overhead: npt.ArrayLike
) -> Array:
    """Batch size that takes ``overhead`` times the examples of a base size.

    E(B)/E(B0) = r gives B = (r - 1) Bcrit + r B0. It is not Bcrit: it grows with the base size
    it is compared with, and meets (r - 1) Bcrit only as B0 vanishes.

    Args:
        critical_batch: Bcrit; positive.
        base_batch_size: B0, the size it is compared with, in the same unit; positive.
        overhead: r, at least 1; 1.2 is the usual "20 % overhead".

    Returns:
        The overhead-r critical batch size, in the unit of ``critical_batch``.

    Raises:
        InvalidInputError: a size is not positive, or the overhead is below 1.

    Source: Zhang et al. 2024 (How does critical batch size scale in pre-training?), whose
    definition by relative overhead is put into the steps law here.

    >>> float(overhead_batch_size(critical_batch=100, base_batch_size=10, overhead=1.5))
    65.0
    """
    ratio = positive("overhead", overhead)
    if np.any(ratio < 1):
        raise InvalidInputError(
            f"overhead {ratio.min():g}", "at least 1 is required", "give for example 1.2"
        )
    base = positive("base_batch_size", base_batch_size)
    return (ratio - 1) * positive("critical_batch", critical_batch) + ratio * base


def fit_tradeoff(
    *,
    batch_size: npt.ArrayLike,
    steps: npt.ArrayLike,
    censored: npt.ArrayLike | None = None,
    log_error: npt.ArrayLike | None = None,
    level: float = 0.95,
    target: str | None = None,
    unit: str = "examples",
) -> Tradeoff:
    """Fit S = Smin (1 + Bcrit/B) to tuned steps to target, with profile intervals.

    log S = log Smin + log(1 + Bcrit/B) + noise, the noise normal with one unknown standard
    deviation (lognormal steps). Rows that hit their budget enter through the probability of
    needing more steps (Tobit). Each interval holds the values whose profile likelihood is
    within n log(1 + F/(n - 2)) of its maximum, F the quantile of F(1, n - 2) and n the rows
    that reached the target: with every row reached this is the exact F region of regression
    at the usual approximation of non-linear least squares; ``benchmarks/coverage_tradeoff.py``
    measures its coverage. Rows are taken as independent.

    Args:
        batch_size: shape (n,), global batch sizes in ``unit``; positive, at least two distinct.
        steps: shape (n,), optimizer steps to the target; positive. For a censored row, the
            steps that were run without reaching it.
        censored: shape (n,), True where ``steps`` is only a lower bound; default: nowhere.
        log_error: shape (n,), standard errors of log(steps), whose ratios alone count: rows of
            less noise weigh more; default: equal.
        level: confidence level of each interval, between 0 and 1.
        target: name of the goal, kept in the record.
        unit: what batch sizes count.

    Returns:
        The fit. Determined only when Bcrit's interval is bounded and away from 0; otherwise
        the point is None, an open upper end is None and an open lower end is 0, and ``detail``
        says which sizes are missing.

    Raises:
        InvalidInputError: lengths differ, a value is not between 1e-15 and 1e15, all batch sizes
            are equal, or the level is not between 0 and 1.

    Source: McCandlish et al. 2018, eq. 2.11 and App. A.3 (fit in log space); Bates and Watts
    1988, ch. 6 (profile t); Tobin 1958 (censoring).

    >>> sizes = [1, 10, 100, 1000]
    >>> fit = fit_tradeoff(batch_size=sizes, steps=[50 * (1 + 20 / b) for b in sizes])
    >>> fit.outcome.value, round(fit.critical_batch.point, 3), round(fit.steps_min.point, 3)
    ('determined', 20.0, 50.0)
    """
    sizes, logs, late = checked_runs(batch_size, steps, censored, level)
    errors = None if log_error is None else positive("log_error", log_error)
    if errors is not None and errors.shape != sizes.shape:
        raise InvalidInputError(
            f"log_error of shape {errors.shape}",
            "one standard error for each run is required",
            "pass an array as long as batch_size",
        )
    quality = _Quality.of(sizes, logs, late)
    if quality.sizes < MIN_SIZES or quality.points < MIN_POINTS:
        nothing = Interval(point=None, low=None, high=None)
        detail = (
            f"{quality.points} rows at {quality.sizes} batch sizes reached the target; at least "
            f"{MIN_POINTS} rows at {MIN_SIZES} sizes are needed: add batch sizes or repeats"
        )
        return Tradeoff(
            steps_min=nothing,
            examples_min=nothing,
            critical_batch=nothing,
            level=level,
            outcome=Outcome.TOO_FEW_STEPS,
            detail=detail,
            fit=quality.record(rms=float("nan"), brackets=False),
            target=target,
            unit=unit,
        )
    likelihood = StepsLikelihood.of(
        log_sizes=np.log(sizes), log_steps=logs, censored=late, log_error=errors
    )
    bounds = profile_intervals(likelihood, level=level)
    critical = _interval(bounds.critical)
    point = critical.point
    reached = sizes[~late]
    brackets = point is not None and bool(reached.min() < point < reached.max())
    return Tradeoff(
        steps_min=_interval(bounds.steps_min),
        examples_min=_interval(bounds.examples_min),
        critical_batch=critical,
        level=level,
        outcome=Outcome.LOWER_BOUND if point is None else Outcome.DETERMINED,
        detail=explain(
            critical,
            sizes=reached,
            logs=logs[~late],
            brackets=brackets,
            lack_of_fit_p=quality.lack_of_fit_p,
        ),
        fit=quality.record(rms=bounds.rms, brackets=brackets),
        overhead_batch=_overhead(critical, float(reached.min())),
        target=target,
        unit=unit,
    )


@dataclass(frozen=True, kw_only=True)
class _Quality:
    """What can be said of the data before the fit."""

    points: int
    censored: int
    sizes: int
    replication_error: float | None
    lack_of_fit_p: float | None

    @classmethod
    def of(cls, sizes: Array, logs: Array, late: npt.NDArray[np.bool_]) -> Self:
        reached = sizes[~late]
        # A size with a censored row shows only its quick repeats: no fair sample of its noise.
        whole = ~np.isin(sizes, sizes[late])
        error, p = _repeats(sizes[whole], logs[whole])
        return cls(
            points=len(reached),
            censored=int(late.sum()),
            sizes=len(np.unique(reached)),
            replication_error=error,
            lack_of_fit_p=p,
        )

    def record(self, *, rms: float, brackets: bool) -> FitQuality:
        return FitQuality(
            points=self.points,
            censored=self.censored,
            batch_sizes=self.sizes,
            rms_log_error=rms,
            replication_error=self.replication_error,
            lack_of_fit_p=self.lack_of_fit_p,
            brackets=brackets,
        )


def _repeats(sizes: Array, logs: Array) -> tuple[float | None, float | None]:
    """Return the pooled standard deviation of repeats and the p-value of the lack of fit.

    F = ((RSS - PSS)/(m - 2)) / (PSS/(n - m)) with RSS the least-squares fit's sum of squares,
    PSS that of the repeats about their own means, m sizes and n rows.
    """
    from scipy.special import fdtrc

    distinct, index = np.unique(sizes, return_inverse=True)
    rows, groups = len(sizes), len(distinct)
    if rows == groups:
        return None, None
    means = np.bincount(index, weights=logs) / np.bincount(index)
    pure = float(np.square(logs - means[index]).sum())
    error = float(np.sqrt(pure / (rows - groups)))
    if groups < MIN_SIZES or pure == 0:
        return error, None
    likelihood = StepsLikelihood.of(
        log_sizes=np.log(sizes), log_steps=logs, censored=np.zeros(rows, dtype=bool)
    )
    squares = rows * likelihood.rms(likelihood.best()) ** 2
    ratio = max(squares - pure, 0.0) / (groups - 2) / (pure / (rows - groups))
    return error, float(fdtrc(groups - 2, rows - groups, ratio))


def _interval(logs: LogInterval) -> Interval:
    with np.errstate(over="ignore"):  # an end beyond every float is an open end
        low, high = float(np.exp(logs.low)), float(np.exp(logs.high))
    bounded = low > 0 and np.isfinite(high)
    return Interval(
        point=float(np.exp(logs.point)) if bounded else None,
        low=low,
        high=high if np.isfinite(high) else None,
    )


def _excess(name: str, ratio: npt.ArrayLike) -> Array:
    excess = positive(name, ratio) - 1
    if np.any(excess <= 0):
        raise InvalidInputError(
            f"{name} {excess.min() + 1:g}", "a ratio above 1 is required", "give for example 1.5"
        )
    return excess


def _overhead(critical: Interval, smallest: float) -> Interval:
    """Put each end of the critical batch into the overhead definition."""

    def at(value: float | None) -> float | None:
        if not value:
            return value
        size = overhead_batch_size(
            critical_batch=value, base_batch_size=smallest, overhead=OVERHEAD
        )
        return float(size)

    return Interval(point=at(critical.point), low=at(critical.low), high=at(critical.high))
