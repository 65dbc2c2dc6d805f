"""From the trials of a sweep, or of a store, to what they say."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from noisescale import __version__
from noisescale.errors import InvalidInputError, nearest
from noisescale.records import SweepCurve, SweepResult, TrialResult, TunedSteps, TuningOutcome
from noisescale.run.store import TrialStore
from noisescale.run.sweep.request import Request
from noisescale.run.sweep.rounds import Tuning
from noisescale.run.sweep.standing import CROSSINGS
from noisescale.theory.trial_table import trial_rows
from noisescale.theory.tuned_steps import tuned_steps


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
        optimizer=recipe.optimizer_kind,
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
    kinds = {result.plan.recipe.optimizer_kind for result in found}
    return _result(
        found,
        workload=store.study.workload.rpartition("-")[0] or store.study.workload,
        optimizer=" and ".join(sorted(kinds)),
        unit=store.study.unit,
        targets=tuple(names),
        unfinished=(),
        seconds=0.0,
        store=str(path),
    )


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
) -> SweepResult:
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
        trials=len(found),
        outcomes=dict(Counter(result.outcome.value for result in found)),
        complete=not unfinished,
        unfinished=unfinished,
        seconds=seconds,
        trial_seconds=sum(result.seconds for result in found),
        store=store,
        version=__version__,
        warnings=tuple(_warnings(first.batch_sizes, unfinished)),
    )


def _warnings(rows: Iterable[TunedSteps], unfinished: Sequence[int]) -> Iterable[str]:
    if unfinished:
        sizes = ", ".join(map(str, unfinished))
        yield (
            f"time was up before the search at batch size {sizes} was over: give the same command"
            " again to go on"
        )
    for row in rows:
        if row.outcome is not TuningOutcome.REACHED:
            yield f"batch size {row.batch_size}: {row.detail or row.outcome.value}"
        if row.failed:
            yield (
                f"batch size {row.batch_size}: {row.failed} of {row.trials} trials crashed, did not"
                " fit in memory or were interrupted"
            )


def _by_size(found: Sequence[TrialResult]) -> dict[int, list[TrialResult]]:
    sizes: dict[int, list[TrialResult]] = {}
    for result in found:
        sizes.setdefault(result.plan.recipe.batch_size, []).append(result)
    return dict(sorted(sizes.items()))


def _curve(found: Sequence[TrialResult], *, target: str, crossing: str, unit: str) -> SweepCurve:
    rows = []
    for of in _by_size(found).values():
        table = trial_rows(of, target=target, crossing=crossing)
        if table:
            rows.append(tuned_steps(table, target=target, crossing=crossing))
    return fit_curve(rows, target=target, crossing=crossing, unit=unit)


def fit_curve(rows: Sequence[TunedSteps], *, target: str, crossing: str, unit: str) -> SweepCurve:
    """Fit the laws to tuned steps."""
    from noisescale.theory.tradeoff import fit_tradeoff

    known = [row for row in rows if row.steps is not None]
    law = None
    if len(known) > 1:
        law = fit_tradeoff(
            batch_size=[row.batch_size for row in known],
            steps=[row.steps or 0 for row in known],
            target=target,
            unit=unit,
        )
    return SweepCurve(
        target=target, crossing=crossing, batch_sizes=tuple(rows), tradeoff=law, regimes=None
    )
