"""Whether a recipe's learning rate is near its best, by a few short runs around it.

The noise scale depends on the rate it is measured at; what uses it for a decision asks here
first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from noisescale.records import RateCheck, Recipe, Target
from noisescale.run.rate_verdict import Trial, judge, leader
from noisescale.run.training import train_run
from noisescale.workload import Workload

FACTORS = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
"""Rates tried, as multiples of the recipe's."""

WIDENINGS = 3
"""Most rates added beyond either end while the best lies there."""

RACE = 1.5
"""A run is stopped at so many times the best steps so far."""

FIRST_SHARE = 0.3
"""Most of the time that the first run, at the recipe's own rate, may take. (assumed)"""

MIN_STEPS = 20
"""Fewest steps by which rates are compared where the goal is out of reach. (assumed)"""


def check_rate(
    workload: Workload,
    *,
    recipe: Recipe | None = None,
    target: Target | None = None,
    seconds: float = 20.0,
    seeds: int = 2,
    factors: Sequence[float] = FACTORS,
    max_steps: int = 2000,
    on_progress: Callable[[str, float | None], None] | None = None,
) -> RateCheck:
    """Try a few rates around the recipe's and say how it compares.

    Rates are compared by their steps to the target; where none reaches it (or there is none),
    by their training loss after equal steps. Runs stop at :data:`RACE` times the best steps
    so far. While the best lies at an end of the grid, up to :data:`WIDENINGS` rates are added
    there. The other seeds are spent on the rates that are still in the race.

    Args:
        workload: what to train.
        recipe: how; the workload's own when None.
        target: the goal; None compares by the training loss.
        seconds: about the most wall time; what was tried until then is judged.
        seeds: runs per rate in the race.
        factors: multiples of the recipe's rate, 1 among them.
        max_steps: most steps of a run.
        on_progress: called before each run.

    Raises:
        InvalidInputError: the batch is larger than the data, or the user's code raised.
    """
    search = _Search(
        workload=workload,
        recipe=recipe or workload.recipe,
        target=target,
        seconds=seconds,
        max_steps=max_steps,
        on_progress=on_progress,
    )
    search.first(len(factors) * seeds)
    # From the middle outwards, so that what time allows is what matters most.
    for factor in sorted(set(factors) - {1.0}, key=lambda f: (abs(math.log(f)), -f)):
        search.try_rate(factor, seed=0)
    search.widen(max(factors), 2.0)
    search.widen(min(factors), 0.5)
    for seed in range(1, seeds):
        for factor in search.contenders():
            search.try_rate(factor, seed=seed)
    return judge(search.trials, recipe=search.recipe, target=target)


class _Search:
    """The runs so far, and the time and the steps that are left to the next one."""

    def __init__(
        self,
        *,
        workload: Workload,
        recipe: Recipe,
        target: Target | None,
        seconds: float,
        max_steps: int,
        on_progress: Callable[[str, float | None], None] | None,
    ) -> None:
        self.recipe = recipe
        self.trials: list[Trial] = []
        self._workload = workload
        self._target = target
        self._seconds = seconds
        self._horizon = max_steps
        self._on_progress = on_progress
        self._began = time.perf_counter()

    def first(self, runs: int) -> None:
        """Run the recipe's own rate; where it misses the goal, share the time out equally."""
        # The first step of a process loads much of torch: not to be taken for a slow model.
        train_run(self._workload, recipe=self.recipe, max_steps=1)
        self._began = time.perf_counter()
        self._run(1.0, seed=0, seconds=FIRST_SHARE * self._seconds)
        run = self.trials[0].run
        if run.steps_to_target is not None or run.diverged:
            return
        affordable = self._left() / max(1, runs - 1) / (run.seconds / max(1, run.steps))
        self._horizon = max(MIN_STEPS, min(run.steps, int(affordable)))

    def try_rate(self, factor: float, *, seed: int) -> None:
        """Run a rate if there is time."""
        if self._left() > 0:
            self._run(factor, seed=seed, seconds=self._left())

    def widen(self, edge: float, step: float) -> None:
        """Add rates beyond an end of the grid while the best lies there."""
        for _ in range(WIDENINGS):
            best = leader(self.trials)
            alone = best is None and step < 1
            if not alone and best != edge:
                return
            edge *= step
            self.try_rate(edge, seed=0)

    def contenders(self) -> list[float]:
        """Rates still in the race: the best first, and the recipe's own."""
        steps = {t.factor: t.run.steps_to_target for t in self.trials if t.seed == 0}
        reached = {factor: s for factor, s in steps.items() if s is not None}
        limit = RACE * min(reached.values(), default=math.inf)
        near = sorted((s, factor) for factor, s in reached.items() if s <= limit)
        best = leader(self.trials)
        ordered = [*([] if best is None else [best]), 1.0, *(factor for _, factor in near)]
        if not reached and best is not None:
            ordered += [best / 2, best * 2]
        return [factor for factor in dict.fromkeys(ordered) if factor in steps]

    def _left(self) -> float:
        return self._seconds - (time.perf_counter() - self._began)

    def _run(self, factor: float, *, seed: int, seconds: float) -> None:
        rate = self.recipe.lr * factor
        if self._on_progress is not None:
            self._on_progress(f"rate check: lr {rate:g}", 1 - self._left() / self._seconds)
        reached = [
            trial.run.steps_to_target
            for trial in self.trials
            if trial.run.steps_to_target is not None
        ]
        race = math.ceil(RACE * max(1.0, min(reached))) if reached else self._horizon
        run = train_run(
            self._workload,
            recipe=self.recipe.with_changes(lr=rate),
            seed=seed,
            max_steps=min(race, self._horizon),
            max_seconds=seconds,
            target=self._target,
        )
        if self.trials and run.stopped == "time":
            return  # cut short by the clock: neither better nor worse than any other
        self.trials.append(Trial(factor, seed, run))
