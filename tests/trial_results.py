"""Results of trials made up for the tests of stores and executors."""

from __future__ import annotations

from typing import Any

from noisescale.records import Crossing, Recipe, TrialOutcome, TrialPlan, TrialResult

TARGETS = ("validation_error<0.05", "validation_loss<0.2")


def plan(seed: int = 0, *, lr: float = 0.5, batch_size: int = 32, **changes: Any) -> TrialPlan:
    recipe = Recipe(lr=lr, batch_size=batch_size)
    values: dict[str, Any] = {
        "workload": "made-up 1",
        "recipe": recipe,
        "seed": seed,
        "order_seed": seed,
        "targets": TARGETS,
        "max_steps": 100,
        **changes,
    }
    return TrialPlan(**values)


def result(of: TrialPlan, outcome: str = "reached", **changes: Any) -> TrialResult:
    first = 10.0 + of.seed if outcome == "reached" else None
    crossings = tuple(
        Crossing(target=target, first=first, sustained=first, closest=0.04) for target in of.targets
    )
    values: dict[str, Any] = {
        "plan": of,
        "outcome": TrialOutcome(outcome),
        "steps": 20,
        "crossings": crossings,
        "stopped_by": "targets",
        "seconds": 0.25,
        **changes,
    }
    return TrialResult(**values)
