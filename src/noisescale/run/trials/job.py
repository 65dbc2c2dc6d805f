"""What is asked of whoever trains trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from noisescale.records.trial import TrialPlan, TrialResult
from noisescale.run.trials.judge import Judge
from noisescale.run.trials.passages import Passages
from noisescale.run.trials.units import RunningTrial, ShouldStop


@dataclass(frozen=True, kw_only=True)
class Job:
    """The arguments of :func:`~noisescale.run.trials.train_trials` that all ways share.

    Attributes:
        plans: of one batch size.
        judge: stops hopeless trials.
        on_result: called with each result.
        should_stop: once true all trials end.
        keep_curves: keep the value of every evaluation.
        capacity: bytes that the trials in training may take together.
    """

    plans: Sequence[TrialPlan]
    judge: Judge | None
    on_result: Callable[[TrialResult], None] | None
    should_stop: ShouldStop | None
    keep_curves: bool
    capacity: int

    def trials(self, places: Sequence[int]) -> list[RunningTrial]:
        """Return trials not begun, their place that in ``places``."""
        return begun_never([self.plans[place] for place in places], keep_curves=self.keep_curves)


def begun_never(plans: Sequence[TrialPlan], *, keep_curves: bool) -> list[RunningTrial]:
    """Return the trials of some plans before their first evaluation."""
    return [
        RunningTrial(plan=plan, place=i, passages=Passages(plan, keep_curves=keep_curves))
        for i, plan in enumerate(plans)
    ]
