"""A judge that stops trials which cannot win at any target any more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from noisescale.records import Crossing, Recipe, TrialResult
from noisescale.run.trials.judge import TrialProgress

HOPELESS = 1.6
"""A setting slower than the best median by this factor is stopped. (measured by
``benchmarks/race_check.py``: no trial near the best is lost from 1.3 on; what settings further
off took steadies the smooth model between them, and moves tuned steps by up to 7 % at 1.3, 4 % at
1.6, 2 % at 2)"""

STRAGGLER = 4.0
"""A seed of a setting that is not stopped is given up at this multiple. (assumed)"""

LUCKY = 1.3
"""A best median over fewer than :data:`MANY` seeds may be too small by this factor. (assumed)"""

MANY = 4
"""Seeds whose median is taken at its word. (assumed)"""

WAIT = 4.0
"""A sustained crossing that no setting has reached yet is waited for until so many times the best
first passage. (assumed)"""

Array = NDArray[np.float64]


class Race:
    """Stops, of the trials of one batch size, those that cannot win; see :class:`Judge`.

    A running trial goes on while it may matter for any target, in first passage or in sustained
    crossing: while its steps are within ``hopeless`` times the best median over seeds. A
    setting whose own median is that good keeps its late seeds up to ``straggler`` times.

    Args:
        finished: results of this batch size from before; their settings race along.
        hopeless: see :data:`HOPELESS`.
        straggler: see :data:`STRAGGLER`.
    """

    def __init__(
        self,
        finished: Iterable[TrialResult] = (),
        *,
        hopeless: float = HOPELESS,
        straggler: float = STRAGGLER,
    ) -> None:
        self._finished = list(finished)
        self._hopeless = hopeless
        self._straggler = straggler
        self._known: tuple[str, ...] = ()
        self._setting: NDArray[np.intp] = np.zeros(0, dtype=np.intp)
        self._rows: list[NDArray[np.intp]] = []
        self._before = np.zeros((0, 0))

    def hopeless(self, progress: Sequence[TrialProgress]) -> set[str]:
        """Return the keys of running trials to stop now.

        Args:
            progress: every trial of the race, ended ones too, in the order of the plans.
        """
        if not any(trial.running for trial in progress):
            return set()
        self._enter(progress)
        steps = np.array([trial.steps for trial in progress], dtype=float)
        passed = np.array([_passages(trial.crossings) for trial in progress])
        medians, lucky = self._medians(np.concatenate([self._before, passed]))
        limits = self._limits(medians, (medians * lucky).min(axis=0))
        matters = (np.isinf(passed) & (steps[:, None] <= limits[self._setting])).any(axis=1)
        # Every target passed: the trial ends by itself.
        matters |= np.isfinite(passed).all(axis=1)
        return {
            trial.key
            for trial, hope in zip(progress, matters, strict=True)
            if trial.running and not hope
        }

    def _enter(self, progress: Sequence[TrialProgress]) -> None:
        """Group the trials by setting, once for the same trials."""
        keys = tuple(trial.key for trial in progress)
        if keys == self._known:
            return
        self._known = keys
        targets = progress[0].plan.targets
        before = [
            result
            for result in self._finished
            if result.plan.targets == targets and result.plan.key not in set(keys)
        ]
        number: dict[str, int] = {}
        plans = [result.plan for result in before] + [trial.plan for trial in progress]
        of = [number.setdefault(setting_name(plan.recipe), len(number)) for plan in plans]
        self._rows = [np.flatnonzero(np.array(of) == i) for i in range(len(number))]
        self._setting = np.array(of[len(before) :], dtype=np.intp)
        self._before = np.array([_passages(result.crossings) for result in before]).reshape(
            len(before), 2 * len(targets)
        )

    def _medians(self, passed: Array) -> tuple[Array, Array]:
        """Upper medians by setting, and by what the few seeds of one may have been lucky."""
        medians = [np.sort(passed[rows], axis=0)[len(rows) // 2] for rows in self._rows]
        lucky = [LUCKY if len(rows) < MANY else 1.0 for rows in self._rows]
        return np.array(medians), np.array(lucky)[:, None]

    def _limits(self, medians: Array, best: Array) -> Array:
        """Return, by setting and kind of passage, the steps up to which a trial goes on."""
        limits = np.where(medians > self._hopeless * best, self._hopeless, self._straggler) * best
        # Columns alternate: first, sustained.
        limits[:, 1::2] = np.minimum(limits[:, 1::2], WAIT * best[None, 0::2])
        return limits


def setting_name(recipe: Recipe) -> str:
    """Return what is equal for the trials that differ in their seed alone."""
    return recipe.to_json()


def _passages(crossings: Sequence[Crossing]) -> list[float]:
    """First and sustained crossing of each target, infinite where there is none yet."""
    return [
        math.inf if steps is None else steps
        for crossing in crossings
        for steps in (crossing.first, crossing.sustained)
    ]
