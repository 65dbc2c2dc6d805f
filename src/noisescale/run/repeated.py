"""One noise scale from several runs to the same goal: seeds differ, and so do their paths."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import numpy as np

from noisescale.records import NoiseScale, Recipe, Target
from noisescale.run.measuring import MeasuredRun, measure_run
from noisescale.run.watching import Progress
from noisescale.theory.interval import estimate_moving
from noisescale.workload import Workload

RUNS = 4
"""Most runs that are pooled. Measured: one run of 80 to 100 steps leaves a 95 % interval of up
to a factor 2.7, four halve its width on the log scale."""


@dataclass(frozen=True, kw_only=True)
class RepeatedRuns:
    """Runs to one goal that differ in their seed.

    Attributes:
        runs: at least one; either all reached the goal, or there is one that did not.
        noise_scale: pooled over the steps of all of them up to the goal.
    """

    runs: tuple[MeasuredRun, ...]
    noise_scale: NoiseScale

    @property
    def first(self) -> MeasuredRun:
        """The run whose trajectory and groups are shown."""
        return self.runs[0]


def measure_runs(
    workload: Workload,
    *,
    recipe: Recipe,
    seed: int,
    target: Target | None,
    max_steps: int,
    max_seconds: float,
    runs: int = RUNS,
    on_progress: Progress | None = None,
) -> RepeatedRuns:
    """Train to the goal once, and again with other seeds while there is time.

    Args:
        workload: what to train.
        recipe: how.
        seed: of the first run; the next ones count up from it.
        target: the goal; without one, or when the first run misses it, one run is all.
        max_steps: most optimizer steps of a run.
        max_seconds: most wall time in all.
        runs: most runs.
        on_progress: called as the work goes on.

    Returns:
        The runs and the noise scale pooled over them.

    Raises:
        InvalidInputError: the batch is larger than the data, or the user's code raised.
    """
    deadline = time.perf_counter() + max_seconds
    done: list[MeasuredRun] = []
    longest = 0.0
    while not done or (len(done) < runs and deadline - time.perf_counter() > 1.5 * longest):
        began = time.perf_counter()
        found = measure_run(
            workload,
            recipe=recipe,
            seed=seed + len(done),
            target=target,
            max_steps=max_steps,
            max_seconds=deadline - began,
            on_progress=on_progress,
        )
        longest = max(longest, time.perf_counter() - began)
        if done and found.run.steps_to_target is None:
            break  # another part of the training than what the others stand for
        done.append(found)
        if found.run.steps_to_target is None:
            break
    return RepeatedRuns(runs=tuple(done), noise_scale=pooled(done))


def pooled(runs: list[MeasuredRun]) -> NoiseScale:
    """Pool the steps of several runs: sum of traces over sum of |G|^2.

    Args:
        runs: of one workload and recipe, at least one.

    Returns:
        The first run's record with the pooled estimate and counts.
    """
    first = runs[0].noise_scale
    if len(runs) == 1:
        return first
    estimate = estimate_moving(
        grad_sq=np.concatenate([run.moments.grad_sq for run in runs]),
        trace_cov=np.concatenate([run.moments.trace_cov for run in runs]),
        examples=np.concatenate([run.moments.examples for run in runs]),
        level=first.level,
    )
    scales = [run.noise_scale for run in runs]
    notes = dict.fromkeys(part for part in (estimate.detail, first.detail) if part)
    return dataclasses.replace(
        first,
        b_simple=estimate.b_simple,
        low=estimate.low,
        high=estimate.high,
        outcome=estimate.outcome,
        detail="; ".join(notes),
        grad_sq=estimate.grad_sq,
        trace_cov=estimate.trace_cov,
        steps=sum(scale.steps for scale in scales),
        examples=sum(scale.examples for scale in scales),
        skipped_steps=sum(scale.skipped_steps for scale in scales),
    )
