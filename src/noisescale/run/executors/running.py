"""Train what a store lacks: the same command again continues."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from noisescale.records import TrialOutcome, TrialPlan, TrialResult
from noisescale.run.executors.executor import Executor, OnResult, ShouldStop
from noisescale.run.store import TrialStore


def run_plans(
    plans: Sequence[TrialPlan],
    store: TrialStore,
    executor: Executor,
    *,
    on_result: OnResult | None = None,
    should_stop: ShouldStop | None = None,
    again: Iterable[TrialOutcome] = (TrialOutcome.INTERRUPTED,),
) -> int:
    """Run the plans that the store lacks; each result is on disk before the next is taken.

    Counts are totals: plans whose results are there are not run again.

    Args:
        plans: all that is wanted in the end.
        store: where results go; locked meanwhile. Nobody else writes to it.
        executor: what trains.
        on_result: told of each new result, after it was stored.
        should_stop: asked a few times per second.
        again: outcomes whose trials are run again.

    Returns:
        How many plans are still missing: 0 unless it was stopped.

    Raises:
        InvalidInputError: another driver has the store, the disk is full, or the workload cannot
            be loaded. What was stored stays.
    """

    def keep(result: TrialResult) -> None:
        store.append(result)
        if on_result is not None:
            on_result(result)

    with store.lock():
        missing = store.missing(plans, again=again)
        if missing:
            executor.run(missing, on_result=keep, should_stop=should_stop)
        return len(store.missing(plans))
