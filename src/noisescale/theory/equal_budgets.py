"""The best metric at an equal budget of steps, examples or epochs, for each batch size.

Which batch size looks best depends on what is held equal: steps favour large batches, epochs
small ones (Shallue et al. 2019, section 4.8). Both are shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from noisescale.errors import InvalidInputError
from noisescale.records import EqualBudget, TrialCurve, TrialOutcome, TrialResult
from noisescale.theory.trial_table import hyper_parameters

KINDS = ("steps", "examples", "epochs")


def trial_curves(results: Iterable[TrialResult]) -> list[TrialCurve]:
    """Return the curves of trials that kept them."""
    return [
        TrialCurve(
            batch_size=result.plan.recipe.batch_size,
            values=hyper_parameters(result.plan.recipe),
            seed=f"{result.plan.seed}/{result.plan.order_seed}",
            outcome=result.outcome,
            steps=result.steps,
            evaluated_at=result.evaluated_at,
            metrics=result.values,
        )
        for result in results
        if result.evaluated_at
    ]


def equal_budgets(
    curves: Sequence[TrialCurve],
    *,
    metric: str,
    kind: str,
    budgets: Sequence[float],
    dataset_size: int | None = None,
    greatest: bool = False,
) -> list[EqualBudget]:
    """Return the best metric of each batch size within each budget.

    A trial's value is the best that it showed at any evaluation within the budget; a diverged
    trial is worse than any that did not. A point's value is the median over its seeds (the
    worse of the middle two), a batch size's the best over its points. The best of many is too
    good by what the noise of a point's median allows: more seeds make it less so.

    Args:
        curves: trials with their evaluations.
        metric: the quantity, as the curves name it.
        kind: ``steps``, ``examples`` or ``epochs``.
        budgets: how many; positive.
        dataset_size: examples of an epoch; needed for epochs.
        greatest: whether larger values are better.

    Returns:
        One entry for each budget and batch size, in that order.

    Raises:
        InvalidInputError: the metric, the kind or a budget cannot be used.
    """
    known = sorted({name for curve in curves for name in curve.metrics})
    if metric not in known:
        raise InvalidInputError(
            f"metric {metric!r}", f"the curves hold {', '.join(known) or 'nothing'}", "choose one"
        )
    if kind not in KINDS or (kind == "epochs" and not dataset_size):
        raise InvalidInputError(
            f"kind {kind!r}", "steps, examples, or epochs with dataset_size are required", "fix it"
        )
    if not all(0 < budget < math.inf for budget in budgets):
        raise InvalidInputError(f"budgets {list(budgets)}", "positive numbers", "check them")
    sizes: dict[int, list[TrialCurve]] = {}
    for curve in curves:
        sizes.setdefault(curve.batch_size, []).append(curve)
    return [
        _at(sizes[size], metric, kind, budget, dataset_size or 1, greatest)
        for budget in budgets
        for size in sorted(sizes)
    ]


def _at(
    curves: Sequence[TrialCurve],
    metric: str,
    kind: str,
    budget: float,
    dataset_size: int,
    greatest: bool,
) -> EqualBudget:
    size = curves[0].batch_size
    steps = budget / {"steps": 1, "examples": size, "epochs": size / dataset_size}[kind]
    sign = -1.0 if greatest else 1.0
    points: dict[str, list[TrialCurve]] = {}
    for curve in curves:
        points.setdefault(str(sorted(curve.values.items())), []).append(curve)
    scored = [
        (statistics.median_high(sorted(values)), values, members[0].values)
        for members in points.values()
        if (values := [v for c in members if (v := _value(c, metric, steps, sign)) is not None])
    ]
    ran = all(c.steps >= steps or c.outcome is TrialOutcome.DIVERGED for c in curves)
    best = min(scored, key=lambda entry: entry[0], default=(math.inf, [], {}))
    if not math.isfinite(best[0]):
        best = (math.inf, [], {})
    ends = sorted(sign * v for v in best[1])
    return EqualBudget(
        batch_size=size,
        kind=kind,
        budget=budget,
        metric=sign * best[0] if best[1] else None,
        low=ends[0] if ends and math.isfinite(ends[0]) else None,
        high=ends[-1] if ends and math.isfinite(ends[-1]) else None,
        best=best[2],
        seeds=len(best[1]),
        whole=ran,
    )


def _value(curve: TrialCurve, metric: str, steps: float, sign: float) -> float | None:
    """Return a trial's signed best within the budget; infinite where it diverged."""
    if curve.outcome is TrialOutcome.DIVERGED and curve.steps <= steps:
        return math.inf
    seen = [
        sign * value
        for at, value in zip(curve.evaluated_at, curve.metrics.get(metric, ()), strict=False)
        if at <= steps and value is not None
    ]
    return min(seen, default=None)
