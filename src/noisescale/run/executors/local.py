"""Trials in processes of this machine: one failure ends one trial."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

from noisescale.errors import InvalidInputError
from noisescale.records import TrialPlan, TrialResult
from noisescale.run.executors.deaths import Deaths
from noisescale.run.executors.executor import (
    RETRIES,
    OnResult,
    ShouldStop,
    WorkerSpec,
)
from noisescale.run.executors.memory_evidence import count_oom_kills
from noisescale.run.executors.worker_process import WorkerProcess, name_of_death

LOOK_EVERY = 0.1
"""Seconds between two looks at what no pipe announces. (assumed)"""

STOP_SECONDS = 2.0
"""What running trials get to end by themselves when stopped, before they are killed. (assumed)"""

START_TRIES = 10
"""Workers that may die while loading, with no good news from any between, before that is blamed on
the workload. (assumed)"""


class LocalExecutor:
    """A supervisor of worker processes.

    A worker that is killed costs the trial that it trained, which is tried again, last of all,
    ``retries`` times and then recorded as crashed with the signal's name; where the system says
    that it killed for want of memory, as infeasible for memory. A worker that ends by itself (the
    user's code calls ``os._exit``) is not given the same trial twice. No process is left behind:
    workers ignore Ctrl-C, are killed when the run ends however it does, and die with the parent.
    Within ``with executor:`` idle workers are kept from one run to the next.

    Args:
        spec: what the workers train.
        slots: trials at a time; one per core by default.
        retries: times that a trial is tried again after its worker was killed.
        threads: torch threads per slot; the cores shared out by default.

    Raises:
        InvalidInputError: ``slots`` is not positive.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        slots: int | None = None,
        retries: int = RETRIES,
        threads: int | None = None,
    ) -> None:
        cores = _cores()
        self.spec = spec
        self.slots = cores if slots is None else slots
        if self.slots < 1:
            raise InvalidInputError(f"slots {slots}", "at least 1 is required", "give slots=1")
        self.retries = retries
        self.threads = max(1, cores // self.slots) if threads is None else threads
        self._held = False
        self._idle: list[WorkerProcess] = []

    def __enter__(self) -> Self:
        """Keep idle workers from now on."""
        self._held = True
        return self

    def __exit__(self, *problem: object) -> None:
        """Leave no worker behind."""
        self._held = False
        while self._idle:
            self._idle.pop().kill()

    def run(
        self,
        plans: Sequence[TrialPlan],
        *,
        on_result: OnResult,
        should_stop: ShouldStop | None = None,
    ) -> None:
        """Train every plan in worker processes; see :class:`Executor`."""
        crew = _Crew(self, plans, on_result, self._idle)
        try:
            crew.work(should_stop or (lambda: False))
            if self._held:
                self._idle = crew.release()
        finally:
            crew.disband()


class _Crew:
    """The workers of one run and what is left to do."""

    def __init__(
        self,
        executor: LocalExecutor,
        plans: Sequence[TrialPlan],
        on_result: OnResult,
        workers: list[WorkerProcess],
    ) -> None:
        self._executor = executor
        self._waiting = deque(plans)
        self._on_result = on_result
        self._workers = workers
        self._selector = selectors.DefaultSelector()
        for worker in workers:
            self._selector.register(worker.output, selectors.EVENT_READ)
        self._stopped = False
        self._deaths = Deaths(executor.retries)
        self._lost_starts = 0
        self._oom_kills = count_oom_kills()

    def work(self, should_stop: ShouldStop) -> None:
        """Until everything is done or should stop."""
        while self._waiting or any(worker.plan for worker in self._workers):
            if should_stop():
                self._stop()
                return
            self._hire()
            self._look()

    def release(self) -> list[WorkerProcess]:
        """Give the workers away; those that were told to stop are good for nothing more."""
        if self._stopped:
            return []
        released, self._workers = self._workers, []
        return released

    def disband(self) -> None:
        """Leave no worker behind."""
        while self._workers:
            self._workers.pop().kill()
        self._selector.close()

    def _stop(self) -> None:
        """Let running trials report how far they are, for a moment."""
        self._stopped = True
        self._waiting.clear()
        for worker in self._workers:
            worker.stop()
        until = time.monotonic() + STOP_SECONDS
        while any(worker.plan for worker in self._workers) and time.monotonic() < until:
            self._look()
            self._waiting.clear()  # the trial of a worker that died now is not tried again

    def _hire(self) -> None:
        """Start workers for what waits, and give the idle ones their next trial."""
        for worker in self._workers:
            free = worker.ready and worker.plan is None and worker.death() is None
            if self._waiting and free:
                worker.train(self._waiting.popleft())
        idle = sum(worker.plan is None for worker in self._workers)
        room = self._executor.slots - len(self._workers)
        for _ in range(min(room, len(self._waiting) - idle)):
            worker = WorkerProcess(self._executor.spec, threads=self._executor.threads)
            self._workers.append(worker)
            self._selector.register(worker.output, selectors.EVENT_READ)

    def _look(self) -> None:
        self._selector.select(timeout=LOOK_EVERY)
        for worker in list(self._workers):
            status = worker.death()  # asked first: what it said before it died still counts
            for message in worker.receive():
                self._hear(worker, message)
            if status is not None:
                self._bury(worker, status)

    def _hear(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        if "refused" in message:
            raise InvalidInputError(*message["refused"])
        if "ready" in message:
            worker.ready, self._lost_starts = True, 0
        else:
            worker.plan, self._lost_starts = None, 0
            self._on_result(TrialResult.from_dict(message["result"]))

    def _bury(self, worker: WorkerProcess, status: int) -> None:
        """See to the trial of a dead worker."""
        plan, ready, seconds = worker.plan, worker.ready, time.monotonic() - worker.began
        words = worker.last_words()
        self._selector.unregister(worker.output)
        self._workers.remove(worker)
        worker.kill()
        death = f"the worker's process {name_of_death(status)}{f' ({words})' if words else ''}"
        if not ready:
            self._mourn_start(status, death)
        elif plan is not None:
            result = self._deaths.verdict(
                plan,
                death,
                for_memory=status == -signal.SIGKILL and self._system_killed(),
                its_own=status >= 0,
                seconds=seconds,
            )
            if result is None:
                self._waiting.append(plan)
            else:
                self._on_result(result)

    def _mourn_start(self, status: int, death: str) -> None:
        self._lost_starts += 1
        if status >= 0 or self._lost_starts >= START_TRIES:
            raise InvalidInputError(
                f"workload {self._executor.spec.workload!r}",
                f"{death} while loading it ({self._lost_starts} in a row)",
                "load it in a Python of its own to see why",
            )

    def _system_killed(self) -> bool:
        """Whether the system has killed for want of memory since this was last asked."""
        before, self._oom_kills = self._oom_kills, count_oom_kills()
        return self._oom_kills > before


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
