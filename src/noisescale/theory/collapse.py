"""Do the curves of several batch sizes fall on one when drawn against temperature?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from noisescale.errors import InvalidInputError
from noisescale.records import Collapse, CollapseRow, TrialOutcome, TrialRow
from noisescale.theory.runs_checked import positive

Array = npt.NDArray[np.float64]

MIN_POINTS = 3
"""Points of a curve that is compared with others."""


def collapse_of_trials(rows: Iterable[TrialRow]) -> Collapse:
    """Compare tuned steps against the rate and against temperature.

    The metric is the logarithm of the steps (median over seeds of the trials that reached the
    target, where half of them did).

    Raises:
        InvalidInputError: no trial with a rate reached the target.
    """
    points: dict[tuple[int, float], list[TrialRow]] = {}
    for row in rows:
        rate = row.values.get("lr")
        if isinstance(rate, int | float):
            momentum = row.values.get("momentum", 0.0)
            kept = momentum if isinstance(momentum, int | float) else 0.0
            points.setdefault((row.batch_size, float(rate) / (1 - kept)), []).append(row)
    table = []
    for (batch_size, rate), trials in sorted(points.items()):
        reached = [t.steps for t in trials if t.outcome is TrialOutcome.REACHED]
        if reached and 2 * len(reached) >= len(trials):
            metric = math.log(statistics.median(reached))
            table.append((batch_size, rate, metric, len(reached)))
    if not table:
        raise InvalidInputError(
            f"{len(points)} points", "a rate that reached the target is required", "run more"
        )
    sizes, rates, metrics, seeds = zip(*table, strict=True)
    return collapse(batch_size=sizes, rate=rates, metric=metrics, seeds=seeds, optimum="least")


def collapse(
    *,
    batch_size: npt.ArrayLike,
    rate: npt.ArrayLike,
    metric: npt.ArrayLike,
    seeds: npt.ArrayLike | None = None,
    optimum: str = "least",
) -> Collapse:
    """Measure how far curves of several batch sizes are apart, by rate and by temperature.

    Each point of a curve is compared with the straight line between the neighbouring points of
    every other curve, in the logarithm of the abscissa, where they overlap; the mean distance
    over the standard deviation of the metric is the mismatch. The metric is first centred on
    each curve's optimum, so that its level (steps fall with the batch size) does not count.

    Args:
        batch_size: shape (n,).
        rate: shape (n,), effective learning rates lr/(1 - m); positive.
        metric: shape (n,), finite.
        seeds: shape (n,), seeds behind each; default 1.
        optimum: ``least`` or ``greatest`` metric is the best.

    Returns:
        The points and both mismatches.

    Raises:
        InvalidInputError: shapes differ, or a value cannot be used.

    Source: the mismatch is that of Bhattacharjee and Seno 2001 (A measure of data collapse for
    scaling), with exponent 1; tau = lr/((1 - m) B) is Smith and Le 2018, section 5.

    >>> b = [8] * 5 + [32] * 5
    >>> lr = [1, 2, 4, 8, 16, 4, 8, 16, 32, 64]
    >>> c = collapse(batch_size=b, rate=lr, metric=[4, 2, 1, 2, 4] * 2)
    >>> c.temperature_mismatch, c.collapses, round(c.optimum_rate_exponent, 9)
    (0.0, True, 1.0)
    """
    sizes, rates = positive("batch_size", batch_size), positive("rate", rate)
    values = np.asarray(metric, dtype=np.float64)
    counts = np.ones(len(sizes)) if seeds is None else positive("seeds", seeds)
    if not sizes.shape == rates.shape == values.shape == counts.shape or sizes.ndim != 1:
        raise InvalidInputError(
            f"batch_size of shape {sizes.shape}, rate {rates.shape}, metric {values.shape}",
            "arrays of equal length are required",
            "pass one entry per point",
        )
    if not np.isfinite(values).all() or optimum not in ("least", "greatest"):
        raise InvalidInputError(
            "metric or optimum", "finite values, and least or greatest are required", "check them"
        )
    signed = values if optimum == "least" else -values
    curves = [_curve(sizes, rates, signed, size) for size in np.unique(sizes)]
    by_rate = _mismatch([(np.log(r), v) for _, r, v in curves])
    by_temperature = _mismatch([(np.log(r / b), v) for b, r, v in curves])
    known = by_rate is not None and by_temperature is not None
    order = np.lexsort((rates, sizes))
    return Collapse(
        rows=tuple(
            CollapseRow(
                batch_size=round(float(sizes[i])),
                rate=float(rates[i]),
                temperature=float(rates[i] / sizes[i]),
                metric=float(values[i]),
                seeds=round(float(counts[i])),
            )
            for i in order
        ),
        rate_mismatch=by_rate,
        temperature_mismatch=by_temperature,
        optimum_rate_exponent=_exponent(curves),
        collapses=bool((by_temperature or 0.0) < (by_rate or 0.0)) if known else None,
    )


_Curve = tuple[float, Array, Array]


def _curve(sizes: Array, rates: Array, signed: Array, size: float) -> _Curve:
    """Return one batch size's rates, ascending, and metric less its best."""
    own = np.flatnonzero(sizes == size)
    own = own[np.argsort(rates[own], kind="stable")]
    return float(size), rates[own], signed[own] - signed[own].min()


def _mismatch(curves: Sequence[tuple[Array, Array]]) -> float | None:
    distances: list[float] = []
    long = [curve for curve in curves if len(curve[0]) >= MIN_POINTS]
    for i, (x, y) in enumerate(long):
        for j, (u, v) in enumerate(long):
            inside = (x >= u[0] - 1e-9) & (x <= u[-1] + 1e-9)
            if i != j and inside.any():
                distances += np.abs(y[inside] - np.interp(x[inside], u, v)).tolist()
    spread = float(np.concatenate([y for _, y in long]).std()) if long else 0.0
    return float(np.mean(distances)) / spread if distances and spread > 0 else None


def _exponent(curves: Sequence[_Curve]) -> float | None:
    """Fit log best rate against log B over curves whose best lies inside."""
    inner = [
        (math.log(b), math.log(r[int(np.argmin(v))]))
        for b, r, v in curves
        if 0 < int(np.argmin(v)) < len(v) - 1
    ]
    if len(inner) < 2:
        return None
    x, y = np.array(inner).T
    x = x - x.mean()
    return float(x @ y / (x @ x))
