"""What may stop trials that cannot win any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from noisescale.records.trial import Crossing, TrialPlan


@dataclass(frozen=True, kw_only=True)
class TrialProgress:
    """How far a trial of a race is.

    Attributes:
        key: of its plan.
        plan: its configuration.
        steps: optimizer steps done at its last evaluation.
        crossings: so far, one per target of the plan, in its order.
        running: whether it is still trained.
    """

    key: str
    plan: TrialPlan
    steps: int
    crossings: tuple[Crossing, ...]
    running: bool


class Judge(Protocol):
    """Decides which running trials are hopeless."""

    def hopeless(self, progress: Sequence[TrialProgress]) -> set[str]:
        """Return the keys of running trials to stop now.

        Args:
            progress: every trial of the race, ended ones too, in the order of the plans.
        """
