"""The noise scale along a workload's own training, or at its first weights."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from noisescale.errors import InvalidInputError
from noisescale.measure.arguments import SOURCES, check_choice, check_count, check_seed
from noisescale.measure.noise_scale import NoiseMeter, measure_noise_scale
from noisescale.measure.step_log import History
from noisescale.records import (
    Curvature,
    Measurement,
    NoiseScale,
    Recipe,
    Target,
    TrajectoryRow,
)
from noisescale.run.curvature_along import CurvatureAlong
from noisescale.run.dry_run import check_workload, fresh_model
from noisescale.run.resolve import resolve_workload
from noisescale.run.training import PATIENCE_NOT_FINITE, TrainingRun, train_run
from noisescale.run.watching import NoiseWatch, Progress, Share, micro_batch_size
from noisescale.workload import Workload

SourceName = Literal["auto", "examples", "microbatches"]
NormName = Literal["none", "adam"]

DEFAULT_STEPS = 1000
"""Most steps of a measurement that names none; it also ends at the workload's target."""

DEFAULT_SECONDS = 60.0
"""Most wall time of a measurement that names neither steps nor seconds."""

FROZEN_DRAWS = 200
"""Most draws at frozen weights unless steps are named; fewer when the data end before."""

WINDOWS = 30
WINDOW_STEPS = 10
"""A trajectory has at most so many windows, each of at least so many measured steps."""


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One training run and the noise scale along it.

    Attributes:
        run: what the training did.
        noise_scale: pooled over the steps up to the goal, or all when it was not reached.
        first: over the first quarter of those steps.
        last: over their last quarter.
        groups: pooled alike, per parameter group.
        trajectory: windows along the run, oldest first.
        warnings: what a reader must know besides, one sentence each.
        moments: of the steps that were pooled, one entry each.
        curvature: of the same steps, where it was asked for and could be had.
    """

    run: TrainingRun
    noise_scale: NoiseScale
    first: NoiseScale
    last: NoiseScale
    groups: dict[str, NoiseScale]
    trajectory: tuple[TrajectoryRow, ...]
    warnings: tuple[str, ...]
    moments: History
    curvature: Curvature | None = None


def measure_workload(
    workload: str | Workload,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    source: SourceName = "auto",
    frozen: bool = False,
    preconditioner: NormName = "none",
    curvature: bool = False,
    seed: int = 0,
    data: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | Iterable[str] | None = None,
    seconds: float | None = None,
    on_progress: Progress | None = None,
) -> Measurement:
    """Measure the gradient noise scale of a workload.

    Args:
        workload: a Workload or its name, see :func:`~noisescale.run.resolve.resolve_workload`.
        steps: optimizer steps to train, or draws at frozen weights; None trains to the
            workload's target, at most :data:`DEFAULT_STEPS`.
        batch_size: global batch size, in the recipe's unit; None takes the recipe's.
        source: ``examples``, ``microbatches`` (an extra pass over eight micro-batches of each
            batch), or ``auto``: examples if every trainable parameter is seen so.
        frozen: hold the weights at their start instead of training.
        preconditioner: ``adam`` for norms of gradients divided as the recipe's Adam divides
            them, see :class:`~noisescale.measure.preconditioned.AdamNorm`.
        curvature: also look at the Hessian's largest eigenvalue along the run, see
            :class:`~noisescale.run.curvature_along.CurvatureAlong`; not at frozen weights.
        seed: of the weights and the data order.
        data: folder of the built-ins that read files.
        overrides: recipe keys to replace.
        seconds: most wall time of the training.
        on_progress: called as the work goes on.

    Returns:
        The measurement. A run whose loss is not finite is a result, with what was measured.

    Raises:
        InvalidInputError: an argument or the workload cannot be used.
    """
    check_choice("source", source, SOURCES)
    check_seed(seed)
    for name, count in (("steps", steps), ("batch size", batch_size)):
        if count is not None:
            check_count(name, count, 100 if name == "steps" else 32)
    resolved = resolve_workload(workload, data=data, overrides=overrides)
    if batch_size is not None:
        resolved = resolved.with_recipe(resolved.recipe.with_changes(batch_size=batch_size))
    _check_norm(preconditioner, resolved.recipe, frozen=frozen)
    if curvature and frozen:
        raise InvalidInputError(
            "curvature at frozen weights", "it is measured along a training", "leave out one"
        )
    check_workload(resolved, target=resolved.target)
    name = workload if isinstance(workload, str) else workload.name
    if frozen:
        return _frozen(resolved, name=name, steps=steps, source=source, seed=seed)
    measured = measure_run(
        resolved,
        seed=seed,
        target=resolved.target if steps is None else None,
        max_steps=steps or DEFAULT_STEPS,
        max_seconds=DEFAULT_SECONDS if steps is None and seconds is None else seconds,
        source=source,
        preconditioner=preconditioner,
        curvature=curvature,
        on_progress=on_progress,
    )
    return Measurement(
        workload=name,
        noise_scale=measured.noise_scale,
        groups=measured.groups,
        trajectory=measured.trajectory,
        batch_size=resolved.recipe.batch_size,
        lr=resolved.recipe.lr,
        frozen=False,
        seconds=measured.run.seconds,
        curvature=measured.curvature,
        warnings=measured.warnings,
    )


def _check_norm(preconditioner: str, recipe: Recipe, *, frozen: bool) -> None:
    check_choice("preconditioner", preconditioner, ("none", "adam"))
    if preconditioner == "none":
        return
    if frozen:
        raise InvalidInputError(
            f"preconditioner {preconditioner!r} at frozen weights",
            "an optimizer that has taken steps is required: second moments come from training",
            "leave out --frozen (frozen=True)",
        )
    if recipe.optimizer_kind != "adam":
        raise InvalidInputError(
            f"preconditioner {preconditioner!r} with optimizer {recipe.optimizer!r}",
            "adam or adamw is required",
            "change the recipe, for example --set optimizer=adamw --set lr=0.001",
        )


def measure_run(
    workload: Workload,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    target: Target | None = None,
    max_steps: int,
    max_seconds: float | None = None,
    source: SourceName = "auto",
    preconditioner: NormName = "none",
    curvature: bool = False,
    on_progress: Progress | None = None,
) -> MeasuredRun:
    """Train to a goal with a meter on every step.

    Args:
        workload: what to train.
        recipe: how; the workload's own when None.
        seed: of the weights and the data order.
        target: the goal at which the run ends; None runs to ``max_steps``.
        max_steps: most optimizer steps.
        max_seconds: most wall time.
        source: as in :func:`measure_workload`.
        preconditioner: as in :func:`measure_workload`.
        curvature: as in :func:`measure_workload`.
        on_progress: called as the work goes on.

    Raises:
        InvalidInputError: the batch is larger than the data, or the user's code raised.
    """
    recipe = recipe or workload.recipe
    watches: list[NoiseWatch] = []

    def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> NoiseWatch:
        meter = NoiseMeter(
            model,
            optimizer,
            source=source,
            unit=recipe.unit,
            # Steps draw from the training set again and again: their spread says nothing of
            # how another training set would differ, so the interval is conditional on this one.
            population_size=workload.train_size,
            preconditioner=preconditioner,
        )
        share = Share(max_steps, max_seconds, on_progress)
        looks = CurvatureAlong(workload, model, optimizer) if curvature else None
        watches.append(NoiseWatch(meter, workload.loss, recipe.batch_size, share, looks))
        return watches[-1]

    run = train_run(
        workload,
        recipe=recipe,
        seed=seed,
        max_steps=max_steps,
        max_seconds=max_seconds,
        target=target,
        stop_when_diverged=False,
        watch=watch,
    )
    return _summary(run, watches[0], target)


def trajectory(
    meter: NoiseMeter, run: TrainingRun, *, windows: int = WINDOWS
) -> tuple[TrajectoryRow, ...]:
    """Cut a run into equal windows of measured steps, each with its own estimate."""
    before = meter.history.step
    count = max(1, min(windows, len(before) // WINDOW_STEPS)) if len(before) else 0
    edges = [round(i * len(before) / count) for i in range(count + 1)] if count else []
    rows = []
    for first, last in itertools.pairwise(edges):
        noise = meter.estimate(first=first, last=last)
        begin, end = int(before[first]), int(before[last - 1]) + 1
        losses = [loss for loss in run.losses[begin:end] if math.isfinite(loss)]
        rows.append(
            TrajectoryRow(
                step=end,
                examples=end * run.batch_size,
                loss=sum(losses) / len(losses) if losses else None,
                grad_sq=noise.grad_sq,
                trace_cov=noise.trace_cov,
                b_simple=noise.b_simple,
                low=noise.low,
                high=noise.high,
            )
        )
    return tuple(rows)


def _about_train_set(target: Target | None) -> bool:
    """A goal on the training loss is about the training set itself, not its distribution."""
    return target is not None and target.split == "train"


def _summary(run: TrainingRun, watch: NoiseWatch, target: Target | None) -> MeasuredRun:
    meter, history = watch.meter, watch.meter.history
    before = history.step
    goal = math.inf if run.steps_to_target is None else run.steps_to_target
    end = int((before < goal).sum())
    quarter = end // 4
    return MeasuredRun(
        run=run,
        noise_scale=meter.estimate(last=end),
        first=meter.estimate(last=quarter),
        last=meter.estimate(first=end - quarter, last=end),
        groups=meter.estimate_groups(last=end),
        trajectory=trajectory(meter, run),
        warnings=tuple(_warnings(run, target)),
        moments=history.until(end),
        curvature=(
            None
            if watch.looks is None
            else watch.looks.summary(steps=math.ceil(min(goal, run.steps)))
        ),
    )


def _warnings(run: TrainingRun, target: Target | None) -> Iterable[str]:
    if run.not_finite_steps:
        ended = (
            f"; the run ended after {PATIENCE_NOT_FINITE} of them in a row"
            if run.stopped == "diverged"
            else ""
        )
        yield (
            f"the loss was not finite at {run.not_finite_steps} of {run.steps} steps, which were"
            f" left out{ended}; try a smaller learning rate"
        )
    elif run.diverged:
        yield (
            f"the loss rose far above its start ({run.initial_loss:.3g}) at learning rate"
            f" {run.lr:g}; the noise scale there says little about a run that works"
        )
    if run.met_at_start:
        yield f"the goal {target} is met before the first step: choose a deeper one"
    if target is not None and run.steps_to_target is None:
        yield f"{target} was not reached in {run.steps} steps"


def _frozen(
    workload: Workload, *, name: str, steps: int | None, source: SourceName, seed: int
) -> Measurement:
    recipe = workload.recipe
    began = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = fresh_model(workload)
        noise, groups = measure_noise_scale(
            model,
            workload.loss,
            workload.train,
            batch_size=recipe.batch_size,
            steps=steps or min(FROZEN_DRAWS, -(-workload.train_size // recipe.batch_size)),
            source=source,
            micro_batch_size=micro_batch_size(model, recipe.batch_size),
            population="train_set" if _about_train_set(workload.target) else "infinite",
            seed=seed,
            collate=workload.collate,
            unit=recipe.unit,
        )
    return Measurement(
        workload=name,
        noise_scale=noise,
        groups=groups,
        trajectory=(),
        batch_size=recipe.batch_size,
        lr=None,
        frozen=True,
        seconds=time.perf_counter() - began,
        warnings=("measured at the initial weights: training changes the noise scale",),
    )
