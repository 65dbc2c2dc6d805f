"""Race many trials of one batch size to a goal, stopping those that cannot win any more.

First passage of the validation error is interpolated between evaluations, whose spacing is a
fixed share of the steps done, so that every batch size is resolved alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

from stacked import Stack, Task, Trial, epoch_batches, make_stack

EVALUATE_EVERY = 0.04  # first passage is resolved to this share of the steps done
EVALUATE_EVERY_FAR = 0.10  # the same while a trial is far from its next goal
SCREEN = 4  # one in so many validation examples is looked at first
SCREEN_SIGMAS = 4.0  # far: the screen's error is above the goal by so many binomial deviations
HOPELESS = 1.3  # a rate that is slower than the best median by this factor is stopped
STRAGGLER = 4.0  # a seed of a rate not stopped yet is given up at this multiple


class Watch:
    """Evaluates each trial of a stack when its turn comes, and notes its first passages.

    A trial far from its next goal is evaluated seldom, and on a share of the validation data.
    """

    def __init__(self, stack: Stack, goals: Sequence[float]) -> None:
        self.stack, self.goals = stack, goals
        self.next = {id(trial): 1 for trial in stack.trials}
        errors = stack.errors(range(len(stack.trials)))
        self.seen = {id(t): (0, e) for t, e in zip(stack.trials, errors, strict=True)}
        self.screen = slice(None, None, SCREEN)

    def due(self) -> int:
        """Return the step at which some trial is to be evaluated next."""
        return min(self.next[id(trial)] for trial in self.stack.trials)

    def far(self, trial: Trial, error: float) -> bool:
        """Return whether an error on the screen rules out that the next goal is passed."""
        goal = max(g for g in self.goals if g not in trial.passages)
        size = len(self.stack.task.y_val[self.screen])
        return error > goal + SCREEN_SIGMAS * math.sqrt(goal * (1 - goal) / size)

    def evaluate(self, step: int) -> None:
        """Evaluate the trials whose turn it is after ``step`` steps."""
        trials = self.stack.trials
        rows = [i for i, trial in enumerate(trials) if self.next[id(trial)] <= step]
        near = []
        for i, error in zip(rows, self.stack.errors(rows, self.screen), strict=True):
            if not self.far(trials[i], error) and not math.isnan(error):
                near.append(i)
                continue
            self._enter(trials[i], step, error, EVALUATE_EVERY_FAR)
        for i, error in zip(near, self.stack.errors(near), strict=True):
            self._enter(trials[i], step, error, EVALUATE_EVERY)

    def _enter(self, trial: Trial, step: int, error: float, share: float) -> None:
        trial.steps = step
        self.next[id(trial)] = step + max(1, int(step * share))
        if math.isnan(error):
            trial.outcome = "diverged"
            return
        if share == EVALUATE_EVERY:
            note_passages(trial, self.goals, self.seen[id(trial)], (step, error))
        self.seen[id(trial)] = (step, error)
        if min(self.goals) in trial.passages:
            trial.outcome = "reached"


def note_passages(
    trial: Trial, goals: Sequence[float], old: tuple[int, float], new: tuple[int, float]
) -> None:
    """Enter first passages between two evaluations (step, error), by linear interpolation."""
    (s0, e0), (s1, e1) = old, new
    for goal in goals:
        if goal not in trial.passages and e1 < goal:
            share = (e0 - goal) / (e0 - e1) if e0 > e1 else 1.0
            trial.passages[goal] = s0 + min(max(share, 0.0), 1.0) * (s1 - s0)


def best_median(trials: Sequence[Trial], goal: float) -> dict[float, float]:
    """Return the median first passage by rate, infinite while too few seeds have passed."""
    by_rate: dict[float, list[float]] = {}
    for trial in trials:
        by_rate.setdefault(trial.lr, []).append(trial.passages.get(goal, math.inf))
    return {lr: statistics.median_high(steps) for lr, steps in by_rate.items()}


def race(
    task: Task,
    *,
    momentum: float,
    batch_size: int,
    rates: Sequence[float],
    seeds: Sequence[int],
    goals: Sequence[float],
    max_steps: int,
    known_best: float = math.inf,
    seconds: float = math.inf,
) -> list[Trial]:
    """Train every rate with every seed until the last goal, stopping those that cannot win.

    Args:
        task: the problem and its model.
        momentum: torch's momentum, 0 for plain SGD.
        batch_size: examples per step.
        rates: constant learning rates.
        seeds: of initial weights and order of the data.
        goals: validation errors to get below; the race is for the lowest.
        max_steps: no trial runs longer.
        known_best: median steps to the last goal of the best rate of an earlier race.
        seconds: CPU time after which the rest counts as not reached.

    Returns:
        Every trial with its outcome.
    """
    trials = [Trial(lr=lr, seed=seed) for seed in seeds for lr in rates]
    stack = make_stack(task, trials, momentum)
    watch = Watch(stack, goals)
    orders = {s: epoch_batches(len(task.x_train), batch_size, s) for s in seeds}
    last, began, step = min(goals), time.process_time(), 0
    while stack.trials and step < max_steps and time.process_time() - began < seconds:
        for _ in range(min(watch.due(), max_steps) - step):
            stack.step({seed: next(orders[seed]) for seed in stack.seeds})
            step += 1
        watch.evaluate(step)
        medians = best_median(trials, last)
        best = min(known_best, *medians.values())
        for trial in stack.trials:
            limit = HOPELESS if medians[trial.lr] > HOPELESS * best else STRAGGLER
            if trial.outcome == "not_reached" and step > limit * best:
                trial.outcome = "hopeless"
        left = [i for i, t in enumerate(stack.trials) if t.outcome == "not_reached"]
        if len(left) < len(stack.trials):
            stack.keep(left) if left else stack.trials.clear()
    return trials
