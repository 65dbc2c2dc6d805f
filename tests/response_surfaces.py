"""Trials that need no training: their steps follow a known surface over rate and batch size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from noisescale import Recipe, Target
from noisescale.records import Crossing, TrialOutcome, TrialPlan, TrialResult
from noisescale.run.trials.judge import TrialProgress

STEPS_MIN, CRITICAL = 60.0, 40.0
RATE_MAX, SATURATION = 0.8, 20.0
BOWL = 0.5
"""Curvature of log steps in log rate about the best rate."""

RECIPE = Recipe(lr=0.3, batch_size=16)


def best_rate(batch_size: int) -> float:
    return RATE_MAX / (1 + SATURATION / batch_size)


def expected_steps(recipe: Recipe, target: str) -> float:
    """Steps of the median seed; infinite above the rate that diverges."""
    B = recipe.batch_size
    away = math.log(recipe.lr / best_rate(B))
    if away > 1.2:
        return math.inf
    goal = Target.parse(target).value
    return STEPS_MIN * (0.05 / goal) * (1 + CRITICAL / B) * math.exp(BOWL * away**2)


def outcome_of(plan: TrialPlan, noise: float = 0.1, ran: float | None = None) -> TrialResult:
    """What training the plan would give, up to ``ran`` steps or its budget."""
    limit = plan.max_steps if ran is None else min(ran, plan.max_steps)
    rng = np.random.default_rng([plan.seed, plan.recipe.batch_size, round(1e6 * plan.recipe.lr)])
    factor = math.exp(noise * rng.standard_normal())
    crossings = []
    for target in plan.targets:
        steps = expected_steps(plan.recipe, target) * factor
        first = steps if steps <= limit else None
        sustained = 1.2 * steps if 1.2 * steps <= limit else None
        goal = Target.parse(target).value
        closest = goal * (0.9 if first else 1 + steps / 1e4) if math.isfinite(steps) else 2.0
        crossings.append(Crossing(target=target, first=first, sustained=sustained, closest=closest))
    reached = all(c.first is not None for c in crossings)
    diverged = math.isinf(expected_steps(plan.recipe, plan.targets[0]))
    outcome = TrialOutcome.NOT_REACHED
    stopped_by, steps = "budget", limit
    if reached:
        outcome, stopped_by = TrialOutcome.REACHED, "targets"
        steps = max(c.sustained or c.first or 0 for c in crossings)
    elif diverged:
        outcome, stopped_by, steps = TrialOutcome.DIVERGED, "divergence", 10
    return TrialResult(
        plan=plan,
        outcome=outcome,
        steps=math.ceil(steps),
        crossings=tuple(crossings),
        stopped_by=stopped_by,
        seconds=0.001,
    )


def train(
    workload: Any,
    plans: Sequence[TrialPlan],
    *,
    judge: Any = None,
    on_result: Callable[[TrialResult], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **_options: Any,
) -> list[TrialResult]:
    """Stand in for ``train_trials``: in lockstep, asking the judge at every evaluation."""
    results: dict[str, TrialResult] = {}
    named = {plan.key: plan for plan in plans}
    whole = {key: outcome_of(plan) for key, plan in named.items()}

    def end(key: str, result: TrialResult) -> None:
        results[key] = result
        if on_result is not None:
            on_result(result)

    step = 1
    while len(results) < len(plans):
        if should_stop is not None and should_stop():
            break
        for key, result in whole.items():
            if key not in results and step >= result.steps:
                end(key, result)
        if judge is not None:
            progress = [_seen(key, whole[key], step, key not in results) for key in named]
            for key in judge.hopeless(progress):
                cut = outcome_of(named[key], ran=step)
                end(key, dataclasses.replace(cut, steps=step, stopped_by="race"))
        step += max(1, int(step * 0.04))
    return [results[key] for key in named if key in results]


def _seen(key: str, whole: TrialResult, step: int, running: bool) -> TrialProgress:
    crossings = tuple(
        dataclasses.replace(
            c,
            first=c.first if c.first is not None and c.first <= step else None,
            sustained=c.sustained if c.sustained is not None and c.sustained <= step else None,
        )
        for c in whole.crossings
    )
    return TrialProgress(
        key=key,
        plan=whole.plan,
        steps=min(step, whole.steps),
        crossings=crossings,
        running=running,
    )
