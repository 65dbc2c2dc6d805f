"""From short runs at several learning rates to a verdict on the recipe's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from noisescale.records import RateCheck, RateTrial, Recipe, Target
from noisescale.run.training import TrainingRun

GRID_STEP = 2.0
"""A rate within this factor of the best may still be near it."""

NEAR_BEST = 1.25
"""... if its steps to the goal are within this factor of the best's."""

TIE = 1.1
"""Steps this close are a tie, in favour of the rate nearest the recipe's: first passages of one
rate differ by about as much between seeds. (assumed)"""

LOSS_SHARE = 0.9
"""By the loss, a rate is near the best with at least this share of the best's decrease."""

NO_SPREAD = 0.02
"""Share of the loss's decrease taken as its spread where only one seed was run. (assumed)"""


class Trial(NamedTuple):
    """One run: the multiple of the recipe's rate, the seed and what happened."""

    factor: float
    seed: int
    run: TrainingRun


def leader(trials: Sequence[Trial]) -> float | None:
    """Return the best factor so far; None when every run diverged or made no step."""
    steps = _steps(trials)
    if steps:
        limit = TIE * min(steps.values())
        return _nearest(factor for factor, value in steps.items() if value <= limit)
    losses = _losses(trials)
    if not losses:
        return None
    limit = min(losses.values()) + _spread(trials, losses)
    return _nearest(factor for factor, value in losses.items() if value <= limit)


def judge(trials: Sequence[Trial], *, recipe: Recipe, target: Target | None) -> RateCheck:
    """Compare the recipe's rate with the best of the trials.

    Args:
        trials: the runs, the recipe's own rate (factor 1) among them.
        recipe: whose rate is judged.
        target: the goal of the runs, for the sentence.
    """
    best = leader(trials)
    verdict = _verdict(trials, best)
    stays = verdict in ("near_best", "unclear") or best is None
    return RateCheck(
        lr=recipe.lr,
        best_lr=None if best is None else recipe.lr * best,
        verdict=verdict,
        detail=_sentence(trials, best, verdict, recipe, target),
        measured_lr=recipe.lr if stays or best is None else recipe.lr * best,
        trials=tuple(_record(trial, recipe) for trial in trials),
    )


def _verdict(trials: Sequence[Trial], best: float | None) -> str:
    if best is None:
        return "too_high" if all(trial.run.diverged for trial in trials) else "unclear"
    steps, losses = _steps(trials), _losses(trials)
    if not steps and _all_tie(trials, losses):
        return "unclear"
    close = abs(math.log(best)) <= math.log(GRID_STEP) + 1e-9
    if best == 1 or (close and _nearly_as_good(trials, best, steps, losses)):
        return "near_best"
    return "too_low" if best > 1 else "too_high"


def _nearly_as_good(
    trials: Sequence[Trial], best: float, steps: dict[float, float], losses: dict[float, float]
) -> bool:
    if steps:
        return steps.get(1.0, math.inf) <= NEAR_BEST * steps[best]
    start = trials[0].run.initial_loss
    return start - losses.get(1.0, math.inf) >= LOSS_SHARE * (start - losses[best])


def _all_tie(trials: Sequence[Trial], losses: dict[float, float]) -> bool:
    # One rate alone cannot be compared with anything.
    values = list(losses.values())
    if len(values) == 1:
        return not any(trial.run.diverged for trial in trials)
    return max(values) - min(values) <= _spread(trials, losses)


def _steps(trials: Sequence[Trial]) -> dict[float, float]:
    """Mean steps to the goal by factor, where at least half of the seeds reached it.

    A run that was stopped before needed at least the steps it had; it counts like the other
    seeds of its rate, or with those steps when they are more.
    """
    found = {}
    for factor, runs in _by_factor(trials).items():
        reached = [run for run in runs if run.steps_to_target is not None]
        if 2 * len(reached) >= len(runs) and not any(run.diverged for run in runs):
            mean = sum(run.steps_to_target or 0.0 for run in reached) / len(reached)
            cut = [max(run.steps, mean) for run in runs if run.steps_to_target is None]
            # Half a step keeps ratios finite where the goal is met from the start.
            found[factor] = max(0.5, (mean * len(reached) + sum(cut)) / len(runs))
    return found


def _losses(trials: Sequence[Trial]) -> dict[float, float]:
    """Mean training loss by factor, after as many steps as every run has that did not diverge."""
    runs = _by_factor([trial for trial in trials if not trial.run.diverged])
    after = min((run.steps for group in runs.values() for run in group), default=0)
    diverged = {trial.factor for trial in trials if trial.run.diverged}
    return {
        factor: sum(_loss_at(run, after) for run in group) / len(group)
        for factor, group in runs.items()
        if factor not in diverged and after > 0
    }


def _loss_at(run: TrainingRun, after: int) -> float:
    return run.mean_loss(end=after, width=max(5, after // 5))


def _spread(trials: Sequence[Trial], losses: dict[float, float]) -> float:
    """Largest difference between seeds of one rate, after equal steps."""
    runs = {f: g for f, g in _by_factor(trials).items() if f in losses}
    after = min(run.steps for group in runs.values() for run in group)
    repeated = [[_loss_at(run, after) for run in g] for g in runs.values() if len(g) > 1]
    if repeated:
        return max(max(values) - min(values) for values in repeated)
    start = trials[0].run.initial_loss
    decrease = abs(start - min(losses.values()))
    return NO_SPREAD * decrease if math.isfinite(decrease) else 0.0


def _by_factor(trials: Sequence[Trial]) -> dict[float, list[TrainingRun]]:
    found: dict[float, list[TrainingRun]] = {}
    for trial in trials:
        found.setdefault(trial.factor, []).append(trial.run)
    return found


def _nearest(factors: Iterable[float]) -> float:
    return min(factors, key=lambda factor: abs(math.log(factor)))


def _record(trial: Trial, recipe: Recipe) -> RateTrial:
    run = trial.run
    loss = run.mean_loss(end=run.steps, width=max(5, run.steps // 5))
    reached = run.steps_to_target is not None
    return RateTrial(
        lr=recipe.lr * trial.factor,
        seed=trial.seed,
        steps_to_target=run.steps_to_target,
        final_loss=loss if math.isfinite(loss) else None,
        outcome="reached" if reached else "diverged" if run.diverged else "not_reached",
    )


def _sentence(
    trials: Sequence[Trial],
    best: float | None,
    verdict: str,
    recipe: Recipe,
    target: Target | None,
) -> str:
    rates = sorted({trial.factor * recipe.lr for trial in trials})
    tried = f"{len(rates)} rates tried from {rates[0]:g} to {rates[-1]:g}"
    if best is None and verdict == "unclear":
        return "there was no time for a single step"
    if best is None:
        return f"learning rate {recipe.lr:g} diverges, as does every other of {tried}"
    steps = _steps(trials)
    if verdict == "unclear":
        return f"the training losses of {tried} cannot be told apart in runs this short"
    if verdict == "near_best" and best == 1:
        return f"learning rate {recipe.lr:g} is the best of {tried}"
    own = _own(trials, best, steps, target)
    near = "near the best" if verdict == "near_best" else verdict.replace("_", " ")
    return f"learning rate {recipe.lr:g} is {near}: {own} ({recipe.lr * best:g} of {tried})"


def _own(
    trials: Sequence[Trial], best: float, steps: dict[float, float], target: Target | None
) -> str:
    """Say how the recipe's rate does beside the best."""
    if any(trial.run.diverged for trial in trials if trial.factor == 1):
        return "it diverges, unlike the best"
    if not steps:
        losses = _losses(trials)
        return f"its training loss is {losses[1.0]:.3g} where the best's is {losses[best]:.3g}"
    needed = f"the {steps[best]:.0f} of the best to {target}"
    if 1.0 in steps:
        return f"it takes {steps[1.0]:.0f} steps against {needed}"
    return f"it does not get there in {trials[0].run.steps} steps against {needed}"
