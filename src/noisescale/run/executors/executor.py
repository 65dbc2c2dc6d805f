"""What every executor does, and what a worker needs to know to train trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from noisescale.records import Crossing, Record, TrialOutcome, TrialPlan, TrialResult

OnResult = Callable[[TrialResult], None]
ShouldStop = Callable[[], bool]

TRAIN = "noisescale.run.trials.alone:train_trial"

RETRIES = 2
"""Times that a trial is tried again after its worker was killed: the death may not have been its
own fault. (assumed)"""


class Executor(Protocol):
    """Trains trials somewhere.

    One failure ends one trial only, which is then a result like any other. An executor writes
    nothing down: its caller does, in ``on_result``.
    """

    def run(
        self,
        plans: Sequence[TrialPlan],
        *,
        on_result: OnResult,
        should_stop: ShouldStop | None = None,
    ) -> None:
        """Train every plan and return when all have ended, or when told to stop.

        Args:
            plans: what to train, each key once.
            on_result: gets each result in the caller's thread, as soon as its trial has ended;
                what it raises ends the run.
            should_stop: asked a few times per second; once true, what runs is interrupted.

        Raises:
            InvalidInputError: the workload cannot be loaded where the trials are trained, or a
                plan cannot be trained.
        """


def held(executor: Executor) -> AbstractContextManager[object]:
    """Return a context in which an executor keeps its workers between runs, if it can.

    Worth it where plans come in rounds: a worker takes seconds to load torch, a Ray cluster ten.
    """
    if isinstance(executor, AbstractContextManager):
        return executor
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class WorkerSpec(Record):
    """How a worker, in a process or on a machine of its own, comes to train trials.

    Attributes:
        workload: as a user names it: a built-in, ``module:attribute`` or
            ``path/to/file.py:attribute``; None where ``train`` needs none.
        data: folder of the built-ins that read files.
        overrides: recipe keys to replace.
        train: ``module:attribute`` of a function like
            :func:`~noisescale.run.trials.alone.train_trial`.
        keep_curves: keep the value of every evaluation.
    """

    workload: str | None
    data: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    train: str = TRAIN
    keep_curves: bool = False


def without_result(plan: TrialPlan, *, why: str, detail: str, seconds: float = 0.0) -> TrialResult:
    """Return the result of a trial that its own code could not report.

    Args:
        plan: its configuration.
        why: ``memory``, ``crash`` or ``interruption``.
        detail: one line on what happened.
        seconds: wall time that it took.
    """
    outcome = {
        "memory": TrialOutcome.INFEASIBLE_MEMORY,
        "crash": TrialOutcome.CRASHED,
        "interruption": TrialOutcome.INTERRUPTED,
    }[why]
    return TrialResult(
        plan=plan,
        outcome=outcome,
        steps=0,
        crossings=tuple(
            Crossing(target=target, first=None, sustained=None, closest=None)
            for target in plan.targets
        ),
        stopped_by=why,
        seconds=seconds,
        detail=detail,
    )
