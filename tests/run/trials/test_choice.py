"""What decides between stacked and one by one."""

from __future__ import annotations

import pytest

from noisescale.records import Recipe
from noisescale.records.trial import TrialPlan
from noisescale.run.trials.choice import evaluations_per_step


@pytest.mark.parametrize(
    ("steps", "evaluations"), [(10, 11), (25, 26), (50, 51), (54, 53), (75, 64)]
)
def test_evaluations_are_counted_by_the_cadence(steps: int, evaluations: int) -> None:
    """At every step up to 50, at every second one up to 75, and at the last one."""
    plan = TrialPlan(
        workload="any",
        recipe=Recipe(lr=0.1, batch_size=2),
        seed=0,
        order_seed=0,
        targets=("validation_loss<1",),
        max_steps=steps,
    )
    assert evaluations_per_step(plan) == evaluations / steps
