"""From the trials of a sweep, or of a store, to what they say."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from noisescale import __version__
from noisescale.errors import InvalidInputError, nearest
from noisescale.records import (
    Recipe,
    SettingSteps,
    SweepCurve,
    SweepResult,
    TrialResult,
    TunedSteps,
    TuningOutcome,
)
from noisescale.run.store import TrialStore
from noisescale.run.sweep.race import setting_name
from noisescale.run.sweep.request import Request
from noisescale.run.sweep.rounds import Tuning
from noisescale.run.sweep.standing import CROSSINGS, standing, steps_of
from noisescale.theory.per_example import rate_coordinate
from noisescale.theory.sweep_curve import sweep_curve
from noisescale.theory.trial_table import FAILED, trial_rows


def summarise_sweep(
    request: Request,
    tunings: Mapping[int, Tuning],
    results: Mapping[str, TrialResult],
    *,
    unfinished: Sequence[int],
    seconds: float,
    store: str | None,
) -> SweepResult:
    """Return what a sweep found; only trials that it asked for count.

    Args:
        request: what was asked.
        tunings: the search of each batch size that was begun.
        results: at hand, by key, of other searches too.
        unfinished: batch sizes whose search is not over.
        seconds: wall time.
        store: folder of the trials.
    """
    asked = {plan.key: plan for tuning in tunings.values() for plan in tuning.plans(results)}
    found = [results[key] for key in asked if key in results]
    recipe = request.workload.recipe
    return _result(
        found,
        workload=request.workload.name,
        optimizer=_optimizer(recipe),
        unit=recipe.unit,
        targets=request.targets,
        unfinished=tuple(sorted({*unfinished, *set(request.batch_sizes) - set(tunings)})),
        seconds=seconds,
        store=store,
    )


def summarise_store(path: str | os.PathLike[str], *, target: str | None = None) -> SweepResult:
    """Return what all trials of a store say; the tuning is over whatever was tried.

    Args:
        path: the store's folder.
        target: the goal to begin with; by default the one that most trials had.

    Raises:
        InvalidInputError: no store is there, it holds no trial, or none of them had the target.
    """
    store = TrialStore.open(path)
    found = list(store.results())
    counts = Counter(name for result in found for name in result.plan.targets)
    if not found:
        raise InvalidInputError(
            f"store {str(path)!r}", "it holds no trial yet", "run noisescale sweep with it first"
        )
    if target is not None and target not in counts:
        raise InvalidInputError(f"target {target!r}", "no trial had it", nearest(target, counts))
    names = sorted(counts, key=lambda name: (name != target, -counts[name]))
    kinds = {_optimizer(result.plan.recipe) for result in found}
    return _result(
        found,
        workload=store.study.workload.rpartition("-")[0] or store.study.workload,
        optimizer=" and ".join(sorted(kinds)),
        unit=store.study.unit,
        targets=tuple(names),
        unfinished=(),
        seconds=0.0,
        store=str(path),
        skipped=[str(line) for line in store.skipped],
    )


def _optimizer(recipe: Recipe) -> str:
    """Name an optimizer as people do: momentum is one of its own, and so is AdamW."""
    return recipe.optimizer_kind if recipe.optimizer == "sgd" else recipe.optimizer


def _result(
    found: Sequence[TrialResult],
    *,
    workload: str,
    optimizer: str,
    unit: str,
    targets: tuple[str, ...],
    unfinished: tuple[int, ...],
    seconds: float,
    store: str | None,
    skipped: Sequence[str] = (),
) -> SweepResult:
    # In one order whatever the order of their ends: equal trials make equal tables, to the bit.
    found = sorted(found, key=lambda result: result.plan.key)
    curves = tuple(
        _curve(found, target=target, crossing=crossing, unit=unit)
        for target in targets
        for crossing in CROSSINGS
    )
    first = curves[0]
    return SweepResult(
        workload=workload,
        optimizer=optimizer,
        unit=unit,
        targets=targets,
        batch_sizes=first.batch_sizes,
        tradeoff=first.tradeoff,
        regimes=first.regimes,
        curves=curves,
        settings=tuple(row for target in targets for row in _settings(found, target)),
        trials=len(found),
        outcomes=dict(Counter(result.outcome.value for result in found)),
        complete=not unfinished,
        unfinished=unfinished,
        seconds=seconds,
        trial_seconds=sum(result.seconds for result in found),
        store=store,
        version=__version__,
        warnings=(*skipped, *_warnings(first.batch_sizes, unfinished, found)),
    )


def _warnings(
    rows: Iterable[TunedSteps], unfinished: Sequence[int], found: Sequence[TrialResult]
) -> Iterable[str]:
    if unfinished:
        sizes = ", ".join(map(str, unfinished))
        yield (
            f"time was up before the search at batch size {sizes} was over: give the same command"
            " again to go on"
        )
    kinds = sorted({_optimizer(result.plan.recipe) for result in found})
    if len(kinds) > 1:
        yield (
            f"trials of {' and '.join(kinds)} are in one table: at each batch size the best of them"
            " counts; sweep each into a folder of its own to compare them"
        )
    for row in rows:
        if row.outcome not in (TuningOutcome.REACHED, TuningOutcome.NOTHING_RAN):
            yield f"batch size {row.batch_size}: {row.detail or row.outcome.value}"
        if row.failed:
            yield f"batch size {row.batch_size}: {_failures(row, found)}"


def _failures(row: TunedSteps, found: Iterable[TrialResult]) -> str:
    """Say how many trials failed in which way, and what the most of them said."""
    failed = [
        result
        for result in found
        if result.plan.recipe.batch_size == row.batch_size and result.outcome in FAILED
    ]
    ways = Counter(result.outcome.value.replace("_", " ") for result in failed)
    words = ", ".join(f"{count} {way}" for way, count in ways.most_common())
    said = Counter(result.detail for result in failed if result.detail).most_common(1)
    return f"of {row.trials} trials {words}" + (f": {said[0][0]}" if said else "")


def _curve(found: Sequence[TrialResult], *, target: str, crossing: str, unit: str) -> SweepCurve:
    rows = trial_rows(found, target=target, crossing=crossing)
    if not rows:
        return SweepCurve(
            target=target,
            crossing=crossing,
            batch_sizes=(),
            tradeoff=None,
            regimes=None,
            detail="no trial has ended yet",
        )
    return sweep_curve(rows, target=target, crossing=crossing, unit=unit)


def _settings(found: Sequence[TrialResult], target: str) -> Iterable[SettingSteps]:
    """Return what each setting took to a target, in order of batch size and rate."""
    groups: dict[str, list[TrialResult]] = {}
    for result in found:
        if target in result.plan.targets:
            groups.setdefault(setting_name(result.plan.recipe), []).append(result)
    rows = [_setting(of, target) for of in groups.values()]
    return sorted(rows, key=lambda row: (row.batch_size, row.lr))


def _setting(of: Sequence[TrialResult], target: str) -> SettingSteps:
    recipe = of[0].plan.recipe
    score = standing(of, target)
    near = [c.closest for r in of for c in r.crossings if c.target == target]
    values = [value for value in near if value is not None]
    return SettingSteps(
        batch_size=recipe.batch_size,
        target=target,
        lr=recipe.lr,
        temperature=rate_coordinate(recipe),
        values={name: value for name, value in recipe.to_dict().items() if value is not None},
        steps=score.steps if score.reached else None,
        seeds=len(of),
        reached=sum(math.isfinite(steps_of(result, target)) for result in of),
        closest=(max if ">" in target else min)(values) if values else None,
    )
