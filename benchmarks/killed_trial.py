"""A trial of a few milliseconds whose result is a function of its plan alone, for `kills.py`."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any

from noisescale.records import Crossing, TrialOutcome, TrialPlan, TrialResult

TRAIN = "killed_trial:train"
TARGET = "train_loss<0.1"


def train(
    workload: Any,  # noqa: ARG001 - the executors' interface
    plan: TrialPlan,
    *,
    keep_curves: bool = False,
    should_stop: Callable[[], bool] | None = None,  # noqa: ARG001
) -> TrialResult:
    """Noisy gradient descent on w^2 / 2 from w = 1, with the noise of the plan's batch size."""
    began = time.perf_counter()
    draws = random.Random(plan.seed)
    rate, deviation = plan.recipe.lr, 1 / math.sqrt(plan.recipe.batch_size)
    weight, first = 1.0, None
    losses: list[float] = []
    for step in range(plan.max_steps):
        losses.append(weight * weight / 2)
        if first is None and losses[-1] < 0.1:
            first = float(step)
        weight -= rate * (weight + deviation * draws.gauss(0, 1))
    crossing = Crossing(target=TARGET, first=first, sustained=None, closest=min(losses))
    return TrialResult(
        plan=plan,
        outcome=TrialOutcome.NOT_REACHED if first is None else TrialOutcome.REACHED,
        steps=plan.max_steps,
        crossings=(crossing,),
        stopped_by="budget",
        seconds=time.perf_counter() - began,
        evaluated_at=tuple(range(0, plan.max_steps, 100)) if keep_curves else (),
        values={"train_loss": tuple(losses[::100])} if keep_curves else {},
    )
