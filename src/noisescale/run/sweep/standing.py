"""How the settings tried at one batch size stand, judged by results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from noisescale.records import Target, TrialResult

CROSSINGS = ("first", "sustained")
"""The two definitions of reaching a target; each is tuned for."""


@dataclass(frozen=True, kw_only=True, order=True)
class Standing:
    """A setting's score; the smaller the better.

    Attributes:
        steps: geometric mean over seeds of the steps to the target, the upper median where a
            seed never got there, infinite where most did not.
        miss: how far from the target the closest value stayed, mean over seeds, infinite where
            nothing was finite; 0 where ``steps`` is finite.
    """

    steps: float
    miss: float = 0.0

    @property
    def reached(self) -> bool:
        """Whether the setting got there with most of its seeds."""
        return math.isfinite(self.steps)


def standing(results: Sequence[TrialResult], target: str, crossing: str = "first") -> Standing:
    """Return how a setting stands at one target.

    Args:
        results: of its seeds, at least one.
        target: as the plans spell it.
        crossing: ``first`` or ``sustained``.

    Raises:
        KeyError: the trials were not run for that target.
    """
    found = [steps_of(result, target, crossing) for result in results]
    steps = mean_steps(found)
    if math.isfinite(steps):
        return Standing(steps=steps)
    misses = [_miss(result, target) for result in results]
    return Standing(steps=math.inf, miss=statistics.fmean(misses))


def steps_of(result: TrialResult, target: str, crossing: str = "first") -> float:
    """Return a trial's steps to a target; infinite where it never got there.

    Args:
        result: the trial.
        target: as its plan spells it.
        crossing: ``first`` or ``sustained``.

    Raises:
        KeyError: the trial was not run for that target.
    """
    for found in result.crossings:
        if found.target == target:
            steps: float | None = getattr(found, crossing)
            return math.inf if steps is None else steps
    raise KeyError(target)


def mean_steps(steps: Sequence[float]) -> float:
    """Return the geometric mean, or the upper median where some are infinite.

    >>> mean_steps([4.0, 9.0]), mean_steps([4.0, 9.0, float("inf")])
    (6.0, 9.0)
    """
    if math.inf in steps:
        return statistics.median_high(steps)
    # A target passed at step 0 needs no training: the mean must not become 0 by it alone.
    return math.exp(statistics.fmean(math.log(max(value, LEAST)) for value in steps))


LEAST = 1e-3
"""Steps below this count as this in a mean of logarithms. (assumed: a passage at step 0)"""


def _miss(result: TrialResult, target: str) -> float:
    goal = Target.parse(target)
    closest = next(found.closest for found in result.crossings if found.target == target)
    if closest is None:
        return math.inf
    return 0.0 if goal.reached(closest) else abs(closest - goal.value)
