"""Steps to target with everything tuned at every batch size."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError, nearest
from noisescale.records import SweepResult, TrialOutcome, TrialPlan, TrialResult
from noisescale.run.executors.executor import Executor, WorkerSpec, held
from noisescale.run.overrides import parse_overrides
from noisescale.run.store import TrialStore
from noisescale.run.sweep.progress import OnProgress, Reporter
from noisescale.run.sweep.race import Race
from noisescale.run.sweep.request import Request, make_request
from noisescale.run.sweep.rounds import Tuning, finished
from noisescale.run.sweep.summary import summarise_sweep
from noisescale.workload import Workload

EXECUTORS = ("local", "ray", "slurm")

Train = Callable[..., Any]
"""Like :func:`noisescale.run.trials.train_trials`."""


def sweep(
    workload: str | Workload,
    *,
    targets: str | Sequence[str] | None = None,
    batch_sizes: str | Sequence[int] | None = None,
    trials: int | None = None,
    seeds: int = 4,
    search: str = "grid",
    full: bool = False,
    over: Iterable[str] = (),
    race: bool = True,
    max_steps: int | None = None,
    max_examples: int | None = None,
    store: str | os.PathLike[str] | None = None,
    engine: str = "auto",
    executor: str | Executor | None = None,
    slots: int | None = None,
    seconds: float | None = None,
    rerun_crashed: bool = False,
    seed: int = 0,
    data: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | Iterable[str] | None = None,
    on_progress: OnProgress | None = None,
) -> SweepResult:
    """Tune at every batch size, and say how many steps each needs to the target.

    Per batch size a few seeds scout settings about the best ones of the sizes next to it, the
    search widens while a best lies on its edge, and the best settings and those next to them
    run all seeds. Which trials are run follows from results alone: with a store, the same call
    again goes on where it was, and counts are totals.

    Args:
        workload: a built-in's name, ``module:attribute``, ``path/to/file.py:attribute`` or a
            Workload (the latter not with an executor).
        targets: goals such as ``validation_error<0.04``, raced for together; the workload's own
            by default.
        batch_sizes: numbers, or a text such as ``2:1024``, ``8,32,full``; about the recipe's by
            default.
        trials: settings per batch size at first; widening adds to them. 5 for a grid, 24 for a
            quasi-random search.
        seeds: runs of the settings that matter.
        search: ``grid`` (of rates) or ``quasi-random`` (in the box of ``over``).
        full: run every setting with every seed.
        over: what a quasi-random search varies beside the rate, each ``NAME`` or
            ``NAME=LOW:HIGH`` with values at the recipe's batch size.
        race: stop trials that cannot win at any target; not with an executor.
        max_steps: budget of a trial in steps.
        max_examples: budget of a trial in examples; with both, the more generous counts.
        store: folder that keeps every trial; None keeps none.
        engine: ``auto`` (measures which is faster), ``stacked`` or ``alone``.
        executor: ``local``, ``ray`` or ``slurm`` for trials in processes of their own, or an
            object with their method; None trains here.
        slots: trials at a time of an executor.
        seconds: about the most wall time; what is not done then is left for another call.
        rerun_crashed: run trials of the store that crashed again, as after mending a loss.
        seed: of each setting's first run; the others count up from it.
        data: folder of the built-ins that read files.
        overrides: recipe keys to replace.
        on_progress: told how far it is.

    Returns:
        Tuned steps per batch size with intervals, the steps law, the three regimes, for each
        target by first passage and by sustained crossing.

    Raises:
        InvalidInputError: bad input, a target that is met before the first step, another driver
            on the store, a store of another workload, or a disk that is full.
    """
    began = time.monotonic()
    request = make_request(
        workload,
        targets=targets,
        batch_sizes=batch_sizes,
        trials=trials,
        seeds=seeds,
        search=search,
        full=full,
        over=over,
        max_steps=max_steps,
        max_examples=max_examples,
        seed=seed,
        data=data,
        overrides=overrides,
    )
    spec = _spec(executor, workload=workload, data=data, overrides=overrides)
    if slots is not None and spec is None:
        raise InvalidInputError(
            f"slots {slots!r}", "an executor by its name is required", "name one, or leave it out"
        )
    deadline = began + (math.inf if seconds is None else seconds)
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(kept_store(request, store))
        if executor is None:
            train = stack.enter_context(trained_by_engine(request, engine, race=race))
        else:
            # Made once the store is ours: it may keep files of its own there.
            made = executor if spec is None else _made(str(executor), spec, slots, store)
            assert not isinstance(made, str)
            stack.enter_context(held(made))
            train = _by_executor(made)
        driver = Driver(
            request=request,
            train=train,
            store=kept,
            reporter=Reporter(
                sizes=len(request.batch_sizes),
                target=request.targets[0],
                tell=on_progress,
                deadline=deadline,
            ),
            deadline=deadline,
            rerun_crashed=rerun_crashed,
        )
        driver.run()
    return summarise_sweep(
        request,
        driver.tunings,
        driver.results,
        unfinished=driver.unfinished,
        seconds=time.monotonic() - began,
        store=None if store is None else str(store),
    )


@dataclass(kw_only=True)
class Driver:
    """Asks for trials batch size by batch size, and keeps what they say.

    Attributes:
        request: what is asked.
        train: ``train(plans, finished, on_result, should_stop)``.
        store: where results go; None keeps them in memory.
        reporter: tells how far it is.
        deadline: monotonic time to stop at.
        rerun_crashed: whether crashes that the store holds count for nothing.
        results: at hand, by key.
        tunings: the search of each batch size that was begun.
        unfinished: batch sizes whose search is not over.
    """

    request: Request
    train: Train
    store: TrialStore | None
    reporter: Reporter
    deadline: float = math.inf
    rerun_crashed: bool = False
    results: dict[str, TrialResult] = field(default_factory=dict)
    tunings: dict[int, Tuning] = field(default_factory=dict)
    unfinished: list[int] = field(default_factory=list)

    def run(self) -> None:
        """Tune every batch size, or stop at the deadline."""
        if self.store is not None:
            self.results = {
                result.plan.key: result
                for result in self.store.results()
                if not (self.rerun_crashed and result.outcome is TrialOutcome.CRASHED)
            }
        tuned: dict[int, float] = {}
        for batch_size in self.request.batch_sizes:
            tuning = self.tunings[batch_size] = self.request.tuning(batch_size, tuned)
            if not self._tune(tuning):
                self.unfinished.append(batch_size)
                continue
            self.reporter.finish(batch_size, tuning.plans(self.results), self.results)
            best = tuning.best_rate(self.results)
            if best is not None:
                tuned[batch_size] = best

    def _tune(self, tuning: Tuning) -> bool:
        """Run the rounds of one batch size; return whether the search is over."""
        while plans := tuning.next_plans(self.results):
            if self._late():
                return False
            asked = tuning.plans(self.results)
            self.reporter.begin(tuning.batch_size, asked, self.results)
            self._train(tuning.batch_size, plans, asked)
            if not self._late():
                _require_results(plans, self.results)
        return True

    def _train(
        self, batch_size: int, plans: Sequence[TrialPlan], asked: Sequence[TrialPlan]
    ) -> None:
        def keep(result: TrialResult) -> None:
            if self.store is not None:
                self.store.append(result)
            self.results[result.plan.key] = result
            self.reporter.report(batch_size, asked, self.results)

        before = [self.results[plan.key] for plan in asked if plan.key in self.results]
        self.train(
            plans,
            finished=[result for result in before if finished(result)],
            on_result=keep,
            should_stop=self._late,
        )

    def _late(self) -> bool:
        return time.monotonic() >= self.deadline


def _require_results(plans: Sequence[TrialPlan], results: Mapping[str, TrialResult]) -> None:
    """A trial that leaves no result would be asked for again and again."""
    lost = [plan.key for plan in plans if not finished(results.get(plan.key))]
    if lost:
        raise RuntimeError(f"{len(lost)} of {len(plans)} trials left no result, {lost[0]} first")


@contextlib.contextmanager
def trained_by_engine(request: Request, engine: str, *, race: bool = True) -> Iterator[Train]:
    """Give what trains plans on this machine; a race starts from what has ended before."""
    from noisescale.run.trials.processes.pool import TrialProcesses

    with TrialProcesses(request.workload) as processes:

        def train(
            plans: Sequence[TrialPlan], *, finished: Sequence[TrialResult], **options: Any
        ) -> None:
            from noisescale.run.trials import train_trials

            judge = Race(finished) if race else None
            train_trials(
                request.workload, plans, judge=judge, engine=engine, processes=processes, **options
            )

        yield train


def _by_executor(executor: Executor) -> Train:
    def train(
        plans: Sequence[TrialPlan], *, finished: Sequence[TrialResult], **options: Any
    ) -> None:
        del finished
        executor.run(plans, **options)

    return train


@contextlib.contextmanager
def kept_store(
    request: Request, store: str | os.PathLike[str] | None
) -> Iterator[TrialStore | None]:
    """Open and lock the folder of the trials; None keeps them nowhere."""
    if store is None:
        yield None
        return
    unit = request.workload.recipe.unit
    with TrialStore.open(store, workload=request.name, unit=unit).lock() as kept:
        yield kept


def _spec(
    executor: str | Executor | None,
    *,
    workload: str | Workload,
    data: str | os.PathLike[str] | None,
    overrides: Mapping[str, Any] | Iterable[str] | None,
) -> WorkerSpec | None:
    """Say how workers load the workload; None where no executor is asked for by its name."""
    if not isinstance(executor, str):
        return None
    if executor not in EXECUTORS:
        raise InvalidInputError(
            f"executor {executor!r}",
            "local, ray or slurm is required",
            nearest(executor, EXECUTORS),
        )
    if isinstance(workload, Workload):
        raise InvalidInputError(
            f"workload {workload.name!r} as an object",
            f"the executor {executor} loads it by its name in other processes",
            "pass module:attribute or path/to/file.py:attribute",
        )
    changes = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides or ())
    return WorkerSpec(
        workload=workload, data=None if data is None else str(data), overrides=dict(changes)
    )


def _made(
    name: str, spec: WorkerSpec, slots: int | None, store: str | os.PathLike[str] | None
) -> Executor:
    module = importlib.import_module(f"noisescale.run.executors.{name}")
    options: dict[str, Any] = {"slots": slots}
    if name == "slurm" and store is not None:
        options["folder"] = Path(store) / "slurm"
    made: Executor = getattr(module, f"{name.capitalize()}Executor")(spec, **options)
    return made
