"""Steps to target at one batch size with every hyper-parameter tuned, with an interval.

The estimand is the smallest, over hyper-parameters, of the median over seeds of the steps. The
fewest steps among noisy points are too few; here the points are smoothed first, and the seeds,
each of which ran all the points that matter, give the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError
from noisescale.records import TrialOutcome, TrialRow, TunedSteps, TuningOutcome
from noisescale.theory.bowl import Bowl, lowest
from noisescale.theory.seed_effects import fill_in
from noisescale.theory.trial_table import FAILED, REPEAT, TrialTable, tables, unscaled

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

UNREPEATED_NOISE = 0.1
"""Noise of log(steps) taken where no point was repeated and too few points were run to tell:
tuned steps scatter by 4 to 10 % over seeds. (measured)"""


def tuned_steps(
    rows: Sequence[TrialRow], *, target: str = "", crossing: str = "first", level: float = 0.95
) -> TunedSteps:
    """Estimate the steps to target at one batch size, every hyper-parameter tuned.

    Points that half of their seeds passed count; log steps = point + seed + noise is fitted to
    them (missing and censored cells filled in, a diverged seed taken as slower than all that
    passed there), and a local quadratic through the points gives the smallest value between
    them. It is a weighted mean of points, so each seed alone gives a value of it: their scatter
    is the error (Student's t with seeds - 1 degrees of freedom), whatever the trials of a seed
    have in common. Without repeats the scatter about the quadratic is the error.

    Args:
        rows: trials of one batch size.
        target: name of the goal, kept in the record.
        crossing: ``first`` or ``sustained``, kept in the record.
        level: confidence level of the interval, between 0 and 1.

    Returns:
        The tuned steps. A target that was not reached gives a lower bound; see ``outcome``.

    Raises:
        InvalidInputError: there are no rows, they are of several batch sizes, a trial reached
            the target before its first step, or the level is not between 0 and 1.

    >>> from noisescale.records import TrialOutcome
    >>> rows = [
    ...     TrialRow(batch_size=8, values={"lr": r}, seed=s, outcome=TrialOutcome.REACHED, steps=n)
    ...     for s, more in (("a", 1.0), ("b", 1.1))
    ...     for r, n in ((0.5, 125 * more), (1.0, 100 * more), (2.0, 125 * more))
    ... ]
    >>> round(tuned_steps(rows).steps)
    105
    """
    _check(rows, level)
    kinds = tables(rows)
    counted = _counts(rows, target=target, crossing=crossing)
    counted["points"] = sum(len(table.points) for table in kinds)
    if not kinds:
        return TunedSteps(outcome=TuningOutcome.NOTHING_RAN, **counted, **_NO_STEPS)
    # Families of words (optimizer, schedule) are few: the best is taken as it is.
    found = [at for table in kinds if (at := _family(table)) is not None]
    if not found:
        return _unreached(rows, counted)
    return _record(min(found, key=lambda at: at.bowl.least), counted, level)


_NO_STEPS: dict[str, Any] = {"steps": None, "low": None, "high": None, "best": {}}


def student(*, level: float, freedom: float | None) -> float:
    """Return the two-sided quantile of Student's t; the normal one for freedom None."""
    from scipy.special import ndtri, stdtrit

    tail = (1 + level) / 2
    return float(ndtri(tail) if freedom is None else stdtrit(freedom, tail))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The smallest value in one table."""

    table: TrialTable
    eligible: Indices
    means: Array
    bowl: Bowl
    seed_values: dict[str, float]
    error: float
    freedom: float | None

    @property
    def own_seeds(self) -> bool:
        """Whether every trial has a seed of its own."""
        return self.table.seeds[0].startswith(REPEAT)

    @property
    def best(self) -> int:
        """Row of the tried point with the fewest steps, the first of equal ones."""
        return int(self.eligible[np.argmin(self.means)])


def _family(table: TrialTable) -> _Found | None:
    """Return the smallest value of a table, None where no point was passed by half its seeds."""
    bounds = _bounds(table)
    passed = table.reached.sum(axis=1)
    eligible = np.flatnonzero((passed > 0) & (2 * passed >= table.run))
    if not len(eligible):
        return None
    cells = fill_in(
        logs=table.logs[eligible], reached=table.reached[eligible], bound=bounds[eligible]
    )
    repeated = len(table.seeds) > 1
    noise = cells.noise if repeated else UNREPEATED_NOISE
    slow = _slow_points(table, bounds, eligible)
    bowl, noise = _smoothed(table, eligible, cells.filled, slow, noise, repeated)
    weights = bowl.weights[: len(eligible)]
    values = cells.filled.T @ weights
    if repeated:
        seeds = len(table.seeds)
        # Filled cells have no noise of their own: r of n leave r/n^2 of the 1/r that is due.
        run = np.maximum(table.run[eligible], 1)
        lack = 1 / run - run / seeds**2
        filled = float(weights**2 @ lack) * cells.noise**2
        doubt = float(weights**2 @ cells.doubt.sum(axis=1)) / seeds / (seeds - 1)
        square = float(values.var(ddof=1)) / seeds + filled + doubt + bowl.model_error**2
        error, freedom = math.sqrt(square), float(seeds - 1)
    else:
        error, freedom = bowl.error, None
    shift = bowl.least - float(values.mean())
    return _Found(
        table=table,
        eligible=eligible,
        means=cells.filled.mean(axis=1),
        bowl=bowl,
        seed_values=dict(zip(table.seeds, (values + shift).tolist(), strict=True)),
        error=error,
        freedom=freedom,
    )


def _smoothed(
    table: TrialTable, eligible: Indices, filled: Array, slow: Array, noise: float, repeated: bool
) -> tuple[Bowl, float]:
    """Fit the bowl; without repeats the noise is what the points leave over about it."""
    means = filled.mean(axis=1)
    others = np.flatnonzero(~np.isnan(slow))
    places = np.concatenate([table.places[eligible], table.places[others]])
    values = np.concatenate([means, slow[others]])
    late = np.arange(len(values)) >= len(eligible)
    counts = np.concatenate([table.reached[eligible].sum(axis=1), np.ones(len(others))])
    low, high, gap = _reach(table, eligible)
    for _ in range(1 if repeated else 10):
        bowl = lowest(
            places=places,
            values=values,
            noise=noise / np.sqrt(counts),
            bounded=late,
            low=low,
            high=high,
            gap=gap,
        )
        if repeated:
            break
        before, noise = noise, _scatter(bowl, places[~late], means, noise)
        if abs(noise - before) < 1e-3 * noise:
            break
    return bowl, noise


def _reach(table: TrialTable, eligible: Indices) -> tuple[Array, Array, Array]:
    """Return where the minimum may lie, half-way to the next slow or diverged point, and gaps."""
    low, high, gap = [], [], []
    for ours, tried in zip(table.places[eligible].T, table.places.T, strict=True):
        places = np.unique(tried)
        below, above = places[places < ours.min()], places[places > ours.max()]
        low.append((ours.min() + (below[-1] if len(below) else ours.min())) / 2)
        high.append((ours.max() + (above[0] if len(above) else ours.max())) / 2)
        lines = len(places) ** (1 / len(table.names))
        gap.append(np.ptp(places) / max(lines - 1, 1))
    return np.array(low), np.array(high), np.array(gap)


def _scatter(bowl: Bowl, places: Array, means: Array, noise: float) -> float:
    """Estimate the noise from the points next to the minimum, towards the assumed one."""
    from noisescale.theory.bowl import residuals

    squares, freedom = residuals(places=places, values=means, noise=noise, centre=bowl.place)
    # Two assumed degrees of freedom keep the noise finite where few points are near.
    return math.sqrt((squares + 2 * UNREPEATED_NOISE**2) / (freedom + 2))


def _bounds(table: TrialTable) -> Array:
    """Return lower bounds of log steps; NaN where a cell was reached or never run.

    A diverged seed never passes: it is slower than every seed that did at its point, and so is
    one that ran longer than they. No more is read from how long it ran.
    """
    slowest = np.where(table.reached, table.logs, -np.inf).max(axis=1, keepdims=True)
    bounds = np.where(table.diverged, np.inf, np.where(table.censored, table.logs, np.nan))
    some = table.reached.any(axis=1, keepdims=True)
    return np.where(some, np.fmin(bounds, np.where(np.isnan(bounds), np.nan, slowest)), bounds)


def _slow_points(table: TrialTable, bounds: Array, eligible: Indices) -> Array:
    """Return a lower bound of the median of each point that is not eligible; NaN for none."""
    least = np.where(table.reached, table.logs, bounds)
    slow = np.full(len(least), np.nan)
    for index in set(range(len(least))) - set(eligible.tolist()):
        run = np.sort(least[index][~np.isnan(least[index])])
        if len(run) and np.isfinite(run[(len(run) - 1) // 2]):
            slow[index] = run[(len(run) - 1) // 2]
    return slow


def _record(found: _Found, counted: dict[str, Any], level: float) -> TunedSteps:
    half = student(level=level, freedom=found.freedom) * found.error
    table, best = found.table, found.table.points[found.best]
    edges = _edges(table, found.best)
    log_steps = found.bowl.least
    return TunedSteps(
        steps=math.exp(log_steps),
        low=math.exp(log_steps - half),
        high=math.exp(min(log_steps + half, 700.0)),
        outcome=TuningOutcome.EDGE if edges else TuningOutcome.REACHED,
        best=best,
        log_error=found.error,
        freedom=found.freedom,
        optimum={
            name: unscaled(name, place, np.array([float(p[name]) for p in table.points]))
            for name, place in zip(table.names, found.bowl.place.tolist(), strict=True)
        },
        temperature=_temperature(best, counted["batch_size"]),
        seeds=int(table.reached[found.best].sum()),
        on_edge=edges,
        seed_values=found.seed_values,
        detail="; ".join(_notes(found, edges)),
        **counted,
    )


def _notes(found: _Found, edges: Sequence[str]) -> list[str]:
    notes = []
    if edges:
        where = f"the best {' and '.join(edges)} lies on an edge of what was tried"
        notes.append(f"{where}: widen the search there")
    if len(found.table.seeds) == 1 and len(found.table.points) > 1 and not found.own_seeds:
        notes.append("one seed: what it does at all points alike is not in the interval")
    return notes


def _edges(table: TrialTable, best: int) -> tuple[str, ...]:
    """Name the hyper-parameters whose best value is the least or greatest that was tried."""
    names = []
    for name, place in zip(table.names, table.places.T, strict=True):
        if place[best] in (place.min(), place.max()):
            names.append(name)
    return tuple(names)


def _temperature(best: dict[str, Any], batch_size: int) -> float | None:
    """Return lr / ((1 - m) B)."""
    if not isinstance(best.get("lr"), int | float):
        return None
    momentum = best.get("momentum", 0.0)
    return float(best["lr"]) / ((1 - (momentum if isinstance(momentum, float) else 0)) * batch_size)


def _unreached(rows: Sequence[TrialRow], counted: dict[str, Any]) -> TunedSteps:
    """Say how far the trials went."""
    run = [row.steps for row in rows if row.outcome is TrialOutcome.NOT_REACHED]
    near = counted["closest"]
    close = "" if near is None else f"; the closest came to {near:.4g}"
    if not run and counted["diverged"] == counted["trials"] - counted["failed"]:
        return TunedSteps(
            outcome=TuningOutcome.DIVERGED,
            detail=f"every trial diverged: try smaller learning rates{close}",
            **counted,
            **_NO_STEPS,
        )
    # The race stops only what is slower than the best: the longest run is the budget.
    low = max(run, default=None)
    return TunedSteps(
        outcome=TuningOutcome.NOT_REACHED,
        detail="no point passed the target with half of its seeds: raise the budget, widen the "
        f"search or choose an easier target{close}",
        **counted,
        **{**_NO_STEPS, "low": low},
    )


def _counts(rows: Sequence[TrialRow], *, target: str, crossing: str) -> dict[str, Any]:
    of = [row.outcome for row in rows]
    near = [row.closest for row in rows if row.closest is not None]
    return {
        "batch_size": rows[0].batch_size,
        "target": target,
        "crossing": crossing,
        "trials": len(rows),
        "reached": of.count(TrialOutcome.REACHED),
        "not_reached": of.count(TrialOutcome.NOT_REACHED),
        "diverged": of.count(TrialOutcome.DIVERGED),
        "failed": sum(outcome in FAILED for outcome in of),
        "closest": (max if ">" in target else min)(near) if near else None,
    }


def _check(rows: Sequence[TrialRow], level: float) -> None:
    sizes = {row.batch_size for row in rows}
    if len(sizes) != 1:
        raise InvalidInputError(
            f"{len(rows)} trials at {len(sizes)} batch sizes",
            "trials of one batch size are required",
            "call once for each batch size",
        )
    if not 0 < level < 1:
        raise InvalidInputError(
            f"level {level:g}", "a value between 0 and 1 is required", "give for example 0.95"
        )
