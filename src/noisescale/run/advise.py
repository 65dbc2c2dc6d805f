"""What batch size to use: the three limits measured, the rate checked, one recommendation."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noisescale import __version__
from noisescale.errors import InvalidInputError
from noisescale.measure.arguments import check_seed
from noisescale.measure.speed import scan_speed
from noisescale.plan.choose import check_wishes, choose, is_number, memory_limit, throughput_knee
from noisescale.plan.critical import FACTORS, calibrated, critical_batch, withheld
from noisescale.records import (
    Advice,
    Calibration,
    Limits,
    Outcome,
    RateCheck,
    Recipe,
    SpeedCurve,
    SpeedFailure,
    SpeedPoint,
    Target,
)
from noisescale.run.dry_run import check_workload
from noisescale.run.rate_check import check_rate
from noisescale.run.repeated import RUNS, RepeatedRuns, measure_runs
from noisescale.run.resolve import resolve_workload
from noisescale.run.watching import Progress
from noisescale.workload import Workload

DEFAULT_SECONDS = 45.0
"""Measuring time of an advice that names none, start-up not counted."""

SPEED_SHARE, RATE_SHARE = 0.3, 0.35
"""Shares of the measuring time; the noise scale has the rest. (assumed)"""

SECOND_SHARE = 0.25
"""Part of the noise scale's time for the second run, at the recipe's own rate. (assumed)"""

MAX_STEPS = 20_000
"""Most steps of the measured run: time or the goal ends it before."""

UNTUNED_WARNING = (
    "the learning rate could not be compared with its neighbours, and the noise scale depends on"
    " it: give more --seconds or a goal that a short run reaches"
)


def advise(
    workload: str | Workload,
    *,
    seconds: float | None = None,
    devices: Sequence[int] = (1,),
    max_waste: float = 1.5,
    margin: float = 0.1,
    target: str | Target | None = None,
    seed: int = 0,
    data: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | Iterable[str] | None = None,
    calibrate: bool = False,
    calibrate_seconds: float | None = None,
    store: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
) -> Advice:
    """Measure what fits, what is fast and what converges, and recommend a batch size.

    In turn: real training steps at growing micro-batch sizes in a child process (memory,
    throughput); a few short runs around the recipe's learning rate, because a noise scale
    measured far from its best says nothing about the tuned run; one training run to the goal
    with per-example (or micro-batch) gradient norms on every step, pooled; the steps law on
    top of them.

    Args:
        workload: a Workload or its name, see :func:`~noisescale.run.resolve.resolve_workload`.
        seconds: about how long to measure, in seconds; None takes 45.
        devices: numbers of replicas that may be used.
        max_waste: largest acceptable ratio of examples to the fewest possible, above 1.
        margin: share of the available memory to keep free.
        target: the goal; None takes the workload's own.
        seed: of the weights and the data order.
        data: folder of the built-ins that read files.
        overrides: recipe keys to replace.
        calibrate: also tune at two or three batch sizes about the critical one that the noise
            scale suggests, and take the critical batch from them.
        calibrate_seconds: about the most time for that; None takes what it needs.
        store: folder that keeps its trials; the same call again goes on from them.
        on_progress: ``on_progress(what, share)`` is called as the work goes on.

    Returns:
        The advice; ``recommended`` is None, with the reason, where the critical batch has no
        lower end.

    Raises:
        InvalidInputError: an argument or the workload cannot be used.
    """
    began = time.perf_counter()
    budget = DEFAULT_SECONDS if seconds is None else seconds
    _check_numbers(budget, margin)
    check_wishes(devices=devices, max_waste=max_waste)
    check_seed(seed)
    goal = Target.parse(target) if isinstance(target, str) else target
    resolved = resolve_workload(workload, data=data, overrides=overrides)
    _check_optimizer(resolved.recipe)
    goal = goal or resolved.target
    check_workload(resolved, target=goal)
    if calibrate and goal is None:
        raise InvalidInputError(
            f"calibrate without a target for workload {resolved.name!r}",
            "steps are counted to a target, and the workload names none",
            'give for example --target "train_loss<0.1"',
        )
    name = workload if isinstance(workload, str) else workload.name
    loader = (
        functools.partial(resolve_workload, workload, data=data, overrides=_listed(overrides))
        if isinstance(workload, str)
        else resolved
    )
    speed = scan_speed(
        loader,
        seconds=SPEED_SHARE * budget,
        margin=margin,
        on_progress=_speed_progress(on_progress, resolved.recipe.unit),
    )
    rate = check_rate(resolved, target=goal, seconds=RATE_SHARE * budget, on_progress=on_progress)
    left = (1 - SPEED_SHARE - RATE_SHARE) * budget
    measured, rate = _noise(resolved, goal, rate, seed=seed, seconds=left, progress=on_progress)
    found = _Findings(
        name=name,
        workload=resolved,
        target=goal,
        speed=speed,
        rate=rate,
        measured=measured,
    )
    if calibrate and _obstacle(found) is None:
        found = dataclasses.replace(
            found,
            calibration=_calibrated(
                found,
                seed=seed,
                seconds=calibrate_seconds,
                store=store,
                progress=on_progress,
            ),
        )
    return _advice(
        found,
        devices=tuple(devices),
        max_waste=max_waste,
        began=began,
    )


def _check_numbers(seconds: Any, margin: Any) -> None:
    if not (is_number(seconds) and 0 < seconds < math.inf):
        raise InvalidInputError(
            f"seconds {seconds!r}", "a positive number is required", "give for example 45"
        )
    if not (is_number(margin) and 0 <= margin < 1):
        raise InvalidInputError(
            f"margin {margin!r}", "a share of at least 0 and below 1 is required", "give 0.1"
        )


@dataclass(frozen=True, kw_only=True)
class _Findings:
    """Everything that was measured."""

    name: str
    workload: Workload
    target: Target | None
    speed: SpeedCurve
    rate: RateCheck
    measured: RepeatedRuns
    calibration: Calibration | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe that was measured."""
        size = self.workload.train_size
        return self.workload.recipe.with_changes(lr=self.rate.measured_lr, dataset_size=size)


def _listed(overrides: Mapping[str, Any] | Iterable[str] | None) -> Any:
    """Keep overrides usable twice: an iterator would be empty in the child."""
    return overrides if overrides is None or isinstance(overrides, Mapping) else list(overrides)


def _speed_progress(
    on_progress: Progress | None, unit: str
) -> Callable[[SpeedPoint | SpeedFailure], None] | None:
    if on_progress is None:
        return None

    def tell(found: SpeedPoint | SpeedFailure) -> None:
        what = (
            f"{found.examples_per_second:,.0f} {unit}/s"
            if isinstance(found, SpeedPoint)
            else found.reason
        )
        on_progress(f"speed: micro-batch {found.micro_batch_size}: {what}", None)

    return tell


def _noise(
    workload: Workload,
    target: Target | None,
    rate: RateCheck,
    *,
    seed: int,
    seconds: float,
    progress: Progress | None,
) -> tuple[RepeatedRuns, RateCheck]:
    """Measure at the best rate; where that is not the recipe's, say what its own would read."""
    moved = rate.measured_lr != rate.lr
    first = seconds * (1 - SECOND_SHARE) if moved else seconds
    measured = _run(workload, rate.measured_lr, target, seed, first, progress)
    if not moved:
        return measured, rate
    own = _run(workload, rate.lr, target, seed, seconds * SECOND_SHARE, progress, runs=1)
    values = rate.to_dict() | {"b_simple_at_lr": own.noise_scale.b_simple}
    return measured, RateCheck.from_dict(values)


def _check_optimizer(recipe: Recipe) -> None:
    """Refuse, before anything is measured, an optimizer that no factor is known for."""
    if recipe.optimizer_kind not in FACTORS:
        raise InvalidInputError(
            f"optimizer {recipe.optimizer!r}",
            "how its critical batch follows from the noise scale is not known",
            "advise on the recipe with sgd, adam or adamw; measure works with lars and lamb too",
        )


def _run(
    workload: Workload,
    lr: float,
    target: Target | None,
    seed: int,
    seconds: float,
    progress: Progress | None,
    runs: int = RUNS,
) -> RepeatedRuns:
    return measure_runs(
        workload,
        recipe=workload.recipe.with_changes(lr=lr),
        seed=seed,
        target=target,
        max_steps=MAX_STEPS,
        max_seconds=seconds,
        runs=runs,
        on_progress=progress,
    )


def _calibrated(
    found: _Findings,
    *,
    seed: int,
    seconds: float | None,
    store: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Calibration:
    """Tune at a few batch sizes about the one that the noise scale suggests."""
    from noisescale.run.calibrate import calibrate, prior_of
    from noisescale.run.sweep.progress import SweepProgress

    def tell(news: SweepProgress) -> None:
        if progress is not None:
            progress(f"tuning at batch size {news.batch_size}: {news.trials} trials", news.share)

    suggested = critical_batch(
        noise=found.measured.noise_scale,
        optimizer=found.workload.recipe.optimizer_kind,
        phase=_phase(found),
    )
    prior, basis = prior_of(suggested, found.recipe)
    return calibrate(
        found.workload.with_recipe(found.recipe.with_changes(dataset_size=None)),
        prior=prior,
        prior_basis=basis,
        target=str(found.target),
        store=store,
        seconds=seconds,
        seed=seed,
        on_progress=tell,
    )


def _advice(
    found: _Findings, *, devices: tuple[int, ...], max_waste: float, began: float
) -> Advice:
    measured, workload = found.measured, found.workload
    unit = workload.recipe.unit
    critical = critical_batch(
        noise=measured.noise_scale, optimizer=workload.recipe.optimizer_kind, phase=_phase(found)
    )
    obstacle = _obstacle(found)
    if obstacle is not None:
        critical = withheld(critical, why=obstacle)
    elif found.calibration is not None and found.calibration.predicted is not None:
        critical = calibrated(critical, curve=found.calibration.predicted)
    choice = choose(
        speed=found.speed,
        critical=critical,
        devices=devices,
        max_waste=max_waste,
        dataset_size=workload.train_size,
        unit=unit,
        own=workload.recipe.batch_size,
        obstacle=obstacle,
    )
    limits = Limits(
        memory=memory_limit(found.speed),
        throughput_knee=throughput_knee(found.speed),
        critical_batch=critical,
    )
    return Advice(
        workload=found.name,
        recipe=found.recipe,
        target=None if found.target is None else str(found.target),
        unit=unit,
        limits=limits,
        rate_check=found.rate,
        table=choice.table,
        recommended=choice.recommended,
        reasons=choice.reasons,
        max_waste=max_waste,
        devices=devices,
        speed=found.speed,
        noise_scale=measured.noise_scale,
        trajectory=measured.first.trajectory,
        groups=measured.first.groups,
        first=measured.first.first,
        last=measured.first.last,
        warnings=tuple(_warnings(found)),
        seconds=time.perf_counter() - began,
        version=__version__,
        calibration=found.calibration,
    )


def _obstacle(found: _Findings) -> str | None:
    """Say why the runs tell nothing about a batch size, with the remedy; None when they do."""
    if found.rate.best_lr is None and found.rate.verdict == "too_high":
        return f"{found.rate.detail}; choose a smaller lr or another recipe"
    if found.measured.first.run.met_at_start:
        return f"the goal {found.target} is met before the first step; choose a deeper one"
    if found.workload.recipe.batch_size == 1:
        return (
            "one example per step shows no spread between examples; measure at a larger batch"
            " (--set batch_size=32)"
        )
    return None


def _phase(found: _Findings) -> str:
    if found.measured.first.run.met_at_start:
        return f"none: {found.target} is met before the first step"
    reached = [one.run.steps_to_target for one in found.measured.runs]
    steps = found.measured.first.run.steps
    if reached[0] is not None:
        counts = ", ".join(f"{count:.0f}" for count in reached if count is not None)
        runs = f"{len(reached)} runs of {counts} steps" if len(reached) > 1 else f"{counts} steps"
        return f"pooled from the start to {found.target} ({runs})"
    if found.target is not None:
        return f"pooled over the first {steps} steps, {found.target} not yet reached"
    return f"pooled over the first {steps} steps"


def _warnings(found: _Findings) -> Iterable[str]:
    yield from found.measured.first.warnings
    if found.rate.verdict in ("too_low", "too_high"):
        yield found.rate.detail
    if found.rate.verdict == "unclear":
        yield f"{UNTUNED_WARNING} ({found.rate.detail})"
    noise, run = found.measured.noise_scale, found.measured.first.run
    if not noise.parameters_seen.complete:
        missing = noise.parameters_seen.missing
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        yield (
            f"{noise.parameters_seen.seen} of {noise.parameters_seen.total} parameters were"
            f" measured; left out: {shown}"
        )
    if noise.outcome is Outcome.DETERMINED and run.steps_to_target is None:
        yield (
            "the critical batch grows with the depth of the goal; this one is for the part of"
            " the training that was seen"
        )
    yield from (f"not probed: {what}" for what in found.speed.not_probed)
