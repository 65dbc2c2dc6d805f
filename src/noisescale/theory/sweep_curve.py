"""A sweep's trials to its curve: tuned steps, steps law, regimes and best rate together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError
from noisescale.records import (
    Interval,
    RateLaw,
    Regimes,
    SweepCurve,
    Tradeoff,
    TrialRow,
    TunedSteps,
    TuningOutcome,
)
from noisescale.theory.pooled_errors import common_variance, moderated
from noisescale.theory.rate_law import fit_rate_law
from noisescale.theory.regimes import fit_regimes
from noisescale.theory.tradeoff import fit_tradeoff
from noisescale.theory.trial_table import REPEAT
from noisescale.theory.tuned_steps import student, tuned_steps

Array = npt.NDArray[np.float64]

LAW_ERROR = 0.03
"""What the steps law leaves over where steps are exact, in log steps; it keeps a few exact rows
from outweighing all others. (measured: the law fits tuned steps to 2 to 10 %)"""
KNOWN = (TuningOutcome.REACHED, TuningOutcome.EDGE)


def sweep_curve(
    rows: Iterable[TrialRow],
    *,
    target: str = "",
    crossing: str = "first",
    level: float = 0.95,
    unit: str = "examples",
) -> SweepCurve:
    """Turn the trials of a sweep into its curve.

    Each batch size is tuned by itself (:func:`tuned_steps`); the variances over seeds are
    pooled as far as they agree; the steps law, the regimes and the rate law are fitted to the
    tuned steps. Where seeds are named alike at several batch sizes, what they have in common
    there widens the levels (fewest steps, fewest examples, plateau).

    Args:
        rows: trials of one target, of any batch sizes.
        target: name of the goal, kept in the records.
        crossing: ``first`` or ``sustained``, kept in the records.
        level: confidence level of every interval, between 0 and 1.
        unit: what batch sizes count.

    Returns:
        The curve; what could not be fitted is None, and ``detail`` says why.

    Raises:
        InvalidInputError: there are no rows, or a row cannot be used.
    """
    groups: dict[int, list[TrialRow]] = {}
    for row in rows:
        groups.setdefault(row.batch_size, []).append(row)
    if not groups:
        raise InvalidInputError(
            f"no trials of target {target!r}", "at least one trial is required", "run the sweep"
        )
    each = [
        tuned_steps(groups[size], target=target, crossing=crossing, level=level)
        for size in sorted(groups)
    ]
    points = pooled(each, level=level)
    return curve_of(points, target=target, crossing=crossing, level=level, unit=unit)


def curve_of(
    points: Sequence[TunedSteps],
    *,
    target: str = "",
    crossing: str = "first",
    level: float = 0.95,
    unit: str = "examples",
) -> SweepCurve:
    """Fit the steps law, the regimes and the rate law to tuned steps.

    Args:
        points: tuned steps, one for each batch size.
        target: name of the goal, kept in the records.
        crossing: kept in the record.
        level: confidence level, between 0 and 1.
        unit: what batch sizes count.
    """
    shift = shared_shift(points, level=level)
    known = [point for point in points if point.steps is not None]
    missing = [f"{p.batch_size} ({p.outcome.value})" for p in points if p.steps is None]
    edges = [str(p.batch_size) for p in points if p.outcome is TuningOutcome.EDGE]
    notes = []
    if missing:
        notes.append(f"no steps at batch sizes {', '.join(missing)}")
    if edges:
        notes.append(f"the best lies on an edge of the search at {', '.join(edges)}")
    return SweepCurve(
        target=target,
        crossing=crossing,
        batch_sizes=tuple(points),
        tradeoff=_tradeoff(points, shift=shift, level=level, target=target, unit=unit),
        regimes=_regimes(known, shift=shift, level=level),
        rate_law=_rate_law(known, level=level),
        detail="; ".join(notes),
    )


def pooled(points: Sequence[TunedSteps], *, level: float = 0.95) -> list[TunedSteps]:
    """Give the intervals of all batch sizes the variance over seeds that they share.

    Few seeds tell their own variance badly; see :func:`moderated`.
    """
    chosen = [p for p in points if p.steps is not None and len(p.seed_values) > 1]
    if not chosen:
        return list(points)
    samples = [np.array(list(p.seed_values.values())) for p in chosen]
    own = np.array([max(float(s.var(ddof=1)), 1e-10) for s in samples])
    counts = np.array([len(s) for s in samples])
    shared, freedom = moderated(variances=own, freedom=counts - 1)
    better = {}
    for p, before, after, n, d in zip(chosen, own, shared, counts, freedom, strict=True):
        rest = max((p.log_error or 0.0) ** 2 - before / n, 0.0)
        better[p.batch_size] = _with_error(p, math.sqrt(rest + after / n), float(d), level)
    return [better.get(point.batch_size, point) for point in points]


def _with_error(point: TunedSteps, error: float, freedom: float, level: float) -> TunedSteps:
    assert point.steps is not None
    half = min(student(level=level, freedom=freedom) * error, 300.0)
    return dataclasses.replace(
        point,
        log_error=error,
        freedom=freedom,
        low=point.steps * math.exp(-half),
        high=point.steps * math.exp(half),
    )


def shared_shift(points: Sequence[TunedSteps], *, level: float = 0.95) -> float:
    """Half-width, in log steps, of the shift that seeds give to all batch sizes alike.

    A seed names the same initial weights at every batch size. What it does there at all of
    them moves the whole curve, and does not show in the scatter about a fit.
    """
    tables = [p.seed_values for p in points if p.steps is not None and len(p.seed_values) > 1]
    names = sorted({name for table in tables for name in table if not name.startswith(REPEAT)})
    if len(tables) < 2 or len(names) < 2:
        return 0.0
    deviations = np.full((len(names), len(tables)), np.nan)
    for column, table in enumerate(tables):
        mean = float(np.mean(list(table.values())))
        for row, name in enumerate(names):
            deviations[row, column] = table.get(name, np.nan) - mean
    error = math.sqrt(common_variance(deviations) / len(names))
    return student(level=level, freedom=len(names) - 1) * error


def _tradeoff(
    points: Sequence[TunedSteps], *, shift: float, level: float, target: str, unit: str
) -> Tradeoff | None:
    rows = [(p, p.steps, False) for p in points if p.steps is not None]
    rows += [(p, p.low, True) for p in points if p.outcome is TuningOutcome.NOT_REACHED and p.low]
    if len({p.batch_size for p, _, _ in rows}) < 2:
        return None
    fit = fit_tradeoff(
        batch_size=[p.batch_size for p, _, _ in rows],
        steps=[float(steps or 0) for _, steps, _ in rows],
        censored=[late for _, _, late in rows],
        log_error=_errors([p for p, _, _ in rows]),
        level=level,
        target=target or None,
        unit=unit,
    )
    return dataclasses.replace(
        fit,
        steps_min=_widened(fit.steps_min, shift),
        examples_min=_widened(fit.examples_min, shift),
    )


def _errors(points: Sequence[TunedSteps]) -> Array:
    """Return standard errors, with what the law leaves over; the median where unknown."""
    own = np.array([np.nan if p.log_error is None else p.log_error for p in points])
    typical = float(np.nanmedian(own)) if (~np.isnan(own)).any() else LAW_ERROR
    errors: Array = np.hypot(np.where(np.isnan(own), typical, own), LAW_ERROR)
    return errors


def _regimes(known: Sequence[TunedSteps], *, shift: float, level: float) -> Regimes | None:
    if len(known) < 2:
        return None
    fit = fit_regimes(
        batch_size=[p.batch_size for p in known],
        steps=[p.steps or 0.0 for p in known],
        log_error=_errors(known),
        level=level,
    )
    return dataclasses.replace(
        fit, examples=_widened(fit.examples, shift), plateau=_widened(fit.plateau, shift)
    )


def _rate_law(known: Sequence[TunedSteps], *, level: float) -> RateLaw | None:
    with_rate = [p for p in known if p.optimum.get("lr") or p.best.get("lr")]
    if len({p.batch_size for p in with_rate}) < 2:
        return None
    return fit_rate_law(
        batch_size=[p.batch_size for p in with_rate],
        rate=[float(p.optimum.get("lr") or p.best["lr"]) for p in with_rate],
        on_edge=["lr" in p.on_edge for p in with_rate],
        level=level,
    )


def _widened(interval: Interval, shift: float) -> Interval:
    """Add an independent half-width, in logarithms, to each end."""
    if shift == 0 or interval.point is None:
        return interval
    low, high = interval.low, interval.high
    if low:
        low = interval.point * math.exp(-math.hypot(math.log(interval.point / low), shift))
    if high:
        high = interval.point * math.exp(math.hypot(math.log(high / interval.point), shift))
    return dataclasses.replace(interval, low=low, high=high)
