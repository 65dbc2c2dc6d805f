"""Trials of one batch size, trained by the fastest sound way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from noisescale.errors import InvalidInputError
from noisescale.measure.memory import available_bytes
from noisescale.records.trial import TrialPlan, TrialResult
from noisescale.run.dry_run import check_batch_size, fresh_model
from noisescale.run.optimizers import make_optimizer
from noisescale.run.trials.bench import Bench, SlotPlan, restricted
from noisescale.run.trials.freed_memory import reuse_freed_memory
from noisescale.run.trials.job import Job
from noisescale.run.trials.judge import Judge
from noisescale.run.trials.processes.pool import TrialProcesses
from noisescale.run.trials.processes.supervisor import Supervisor
from noisescale.run.trials.units import ShouldStop
from noisescale.run.trials.workers import Workers
from noisescale.workload import Workload

MEMORY_SHARE = 0.25
"""Share of the memory that is free which trials may take together. (assumed)"""

ENGINES = ("auto", "stacked", "alone")


def train_trials(
    workload: Workload,
    plans: Sequence[TrialPlan],
    *,
    judge: Judge | None = None,
    on_result: Callable[[TrialResult], None] | None = None,
    should_stop: ShouldStop | None = None,
    engine: str = "auto",
    keep_curves: bool = False,
    memory_bytes: int | None = None,
    workers: int | None = None,
    processes: TrialProcesses | None = None,
) -> list[TrialResult]:
    """Train trials of one batch size until each has passed its targets or ended otherwise.

    The crossings are those of :func:`~noisescale.run.trials.alone.train_trial` up to rounding.

    Args:
        workload: model, loss and data; its own recipe is not used.
        plans: what to train; all of one batch size.
        judge: stops hopeless trials; asked after evaluations.
        on_result: called with each result as soon as its trial ends, one at a time, from a
            thread of the engine.
        should_stop: asked often, by several threads; once true all trials end as
            ``interrupted``.
        engine: ``auto`` takes the faster of ``stacked`` and ``alone`` by measurement.
        keep_curves: keep the value of every evaluation.
        memory_bytes: what the trials in training may take together; default: a quarter of what
            is free. Trials that do not fit wait for others to end.
        workers: that train at the same time; default: as many as torch may use threads. Each
            computes with one thread of torch when there are several.
        processes: where several workers train instead of in threads of this process, if it is
            worth their start; the caller closes them.

    Returns:
        One result per plan, in their order.

    Raises:
        InvalidInputError: batch sizes differ or exceed the data, a recipe cannot be used, or
            ``engine="stacked"`` and the workload cannot be stacked, or the processes are
            another workload's.
    """
    if engine not in ENGINES:
        raise InvalidInputError(
            f"engine {engine!r}", "auto, stacked or alone is required", "choose one"
        )
    if not plans:
        return []
    _check(workload, plans)
    bench = _bench(workload, processes)
    reuse_freed_memory()
    job = Job(
        plans=plans,
        judge=judge,
        on_result=on_result,
        should_stop=should_stop,
        keep_curves=keep_curves,
        capacity=memory_bytes or int(MEMORY_SHARE * available_bytes()),
    )
    with _threads(min(workers or torch.get_num_threads(), len(plans))) as count:
        trials = job.trials(range(len(plans)))
        slots, seconds = bench.plan_slots(
            trials, engine=engine, capacity=job.capacity, workers=count,
            timed=processes is not None,
        )  # fmt: skip
        results: dict[int, TrialResult] = {}
        apart = processes is not None and count > 1 and not _long_products(slots)
        if processes is not None and apart and processes.usable(count, seconds / count):
            results = Supervisor(processes, job, slots, count).run()
        # What no process could be started for is trained here.
        left = [place for place in range(len(plans)) if place not in results]
        if left:
            own = job.trials(left)
            crew = Workers(
                bench.slots(restricted(slots, left), own, isolated=bench.isolated),
                own,
                capacity=job.capacity,
                judge=judge,
                on_result=on_result,
                should_stop=should_stop,
            )
            crew.run(1 if bench.isolated else count)
            results.update({left[i]: result for i, result in crew.results.items()})
    return [results[place] for place in range(len(plans))]


def _long_products(slots: Sequence[SlotPlan]) -> bool:
    """Whether threads are as good as processes: stacked convolutions seldom need Python's lock.

    Measured on digits-cnn: from alike to 13 s in threads and 20 in processes, at batch 128.
    """
    return any(slot.route == "channels" for slot in slots)


def _bench(workload: Workload, processes: TrialProcesses | None) -> Bench:
    if processes is None:
        return Bench(workload)
    if processes.workload is not workload:
        raise InvalidInputError(
            f"processes of workload {processes.workload.name!r}",
            f"those of the same object as workload {workload.name!r} are required",
            "make TrialProcesses(workload) of it",
        )
    return processes.bench


def _check(workload: Workload, plans: Sequence[TrialPlan]) -> None:
    sizes = sorted({plan.recipe.batch_size for plan in plans})
    if len(sizes) > 1:
        raise InvalidInputError(
            f"plans of batch sizes {sizes}", "one batch size is required", "train them in turn"
        )
    check_batch_size(workload, sizes[0])
    with torch.random.fork_rng():
        model = fresh_model(workload)
    for recipe in {repr(plan.recipe): plan.recipe for plan in plans}.values():
        make_optimizer(model, recipe)


@contextmanager
def _threads(wanted: int) -> Iterator[int]:
    before = torch.get_num_threads()
    if wanted > 1:
        torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # Some functions have no batching rule: whether that is too slow is measured.
            warnings.filterwarnings("ignore", message="There is a performance drop because")
            yield max(1, wanted)
    finally:
        torch.set_num_threads(before)
