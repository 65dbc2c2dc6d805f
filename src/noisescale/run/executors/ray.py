"""Trials as tasks of a Ray cluster, or of this machine's cores through Ray."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from noisescale.errors import InvalidInputError, MissingExtraError
from noisescale.records import TrialPlan, TrialResult
from noisescale.run.executors.deaths import Deaths
from noisescale.run.executors.executor import RETRIES, OnResult, ShouldStop, WorkerSpec
from noisescale.run.executors.one_trial import (
    Trainer,
    in_one_line,
    limit_threads,
    load_trainer,
    run_one,
)
from noisescale.run.executors.ray_output import rays_messages_to_stderr

LOOK_EVERY = 0.2
"""Seconds between two looks at whether to stop. (assumed)"""


class RayExecutor:
    """One Ray task per trial.

    Ray's own retries are off: a trial whose worker or machine died is tried again, last of all,
    ``retries`` times and then recorded as crashed; where Ray's memory monitor killed it, as
    infeasible for memory. The workload must be importable on every machine under the same name.
    A cluster that this started is shut down when the run ends, or at the end of
    ``with executor:``; one that was there is left alone.

    Args:
        spec: what the workers train.
        address: of a running cluster; by default what ``ray.init`` is already connected to, and
            else this machine.
        slots: trials at a time; by default as many as the cluster has cores for.
        retries: times that a trial is tried again after its worker died.
        cpus: cores per trial, which are its torch threads too.
        gpus: GPUs per trial; a share such as 0.5 is allowed.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        address: str | None = None,
        slots: int | None = None,
        retries: int = RETRIES,
        cpus: int = 1,
        gpus: float = 0,
    ) -> None:
        _import_ray()
        self.spec = spec
        self.address = address
        self.slots = slots
        self.retries = retries
        self.cpus = cpus
        self.gpus = gpus
        self._held = False
        self._started = False
        self._output = ExitStack()

    def __enter__(self) -> Self:
        """Keep the cluster from one run to the next."""
        self._held = True
        self._output.enter_context(rays_messages_to_stderr())
        return self

    def __exit__(self, *problem: object) -> None:
        """Shut down what was started."""
        self._held = False
        self._shut_down()
        self._output.close()

    def run(
        self,
        plans: Sequence[TrialPlan],
        *,
        on_result: OnResult,
        should_stop: ShouldStop | None = None,
    ) -> None:
        """Train every plan as a task; see :class:`Executor`."""
        with rays_messages_to_stderr():
            self._run(plans, on_result, should_stop or (lambda: False))

    def _run(
        self, plans: Sequence[TrialPlan], on_result: OnResult, should_stop: ShouldStop
    ) -> None:
        ray = _import_ray()
        if not ray.is_initialized():
            self._started = True
            _start(ray, self.address, self.slots)
        tasks = _Tasks(self, ray, plans, on_result)
        try:
            tasks.work(should_stop)
        finally:
            tasks.cancel()
            if not self._held:
                self._shut_down()

    def _shut_down(self) -> None:
        if self._started:
            self._started = False
            _import_ray().shutdown()


@dataclass(frozen=True)
class _Try:
    plan: TrialPlan
    began: float


class _Tasks:
    """The tasks of one run."""

    def __init__(
        self, executor: RayExecutor, ray: Any, plans: Sequence[TrialPlan], on_result: OnResult
    ) -> None:
        self._ray = ray
        self._spec = executor.spec.to_json()
        self._threads = executor.cpus
        self._task = ray.remote(_train).options(
            max_retries=0, num_cpus=executor.cpus, num_gpus=executor.gpus
        )
        # One more than there are cores, so that none waits for the driver.
        self._room = executor.slots or 1 + int(ray.cluster_resources().get("CPU", 1))
        self._waiting = deque(plans)
        self._running: dict[Any, _Try] = {}
        self._deaths = Deaths(executor.retries)
        self._on_result = on_result

    def work(self, should_stop: ShouldStop) -> None:
        """Until everything is done or should stop."""
        while (self._waiting or self._running) and not should_stop():
            while self._waiting and len(self._running) < self._room:
                self._submit(self._waiting.popleft())
            done, _ = self._ray.wait(list(self._running), timeout=LOOK_EVERY)
            for reference in done:
                self._collect(reference)

    def cancel(self) -> None:
        """Kill what still runs."""
        while self._running:
            reference, _ = self._running.popitem()
            self._ray.cancel(reference, force=True)

    def _submit(self, plan: TrialPlan) -> None:
        path = [str(entry) for entry in sys.path]
        reference = self._task.remote(self._spec, plan.to_json(), path, self._threads)
        self._running[reference] = _Try(plan, time.monotonic())

    def _collect(self, reference: Any) -> None:
        attempt = self._running.pop(reference)
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as problem:
            raise InvalidInputError(
                "the workers' machines",
                in_one_line(problem.cause or problem),
                "install the same noisescale and the workload on each of them",
            ) from None
        except self._ray.exceptions.RayError as problem:
            self._mourn(attempt, problem)
            return
        if "refused" in answer:
            raise InvalidInputError(*answer["refused"])
        self._on_result(TrialResult.from_dict(answer["result"]))

    def _mourn(self, attempt: _Try, problem: Exception) -> None:
        for_memory = isinstance(problem, self._ray.exceptions.OutOfMemoryError)
        result = self._deaths.verdict(
            attempt.plan,
            f"Ray lost the worker ({in_one_line(problem)[:200]})",
            for_memory=for_memory,
            seconds=time.monotonic() - attempt.began,
        )
        if result is None:
            self._waiting.append(attempt.plan)
        else:
            self._on_result(result)


def _train(spec: str, plan: str, path: list[str], threads: int) -> dict[str, Any]:
    """Run in a worker: train one trial; what is refused is told rather than raised."""
    sys.path.extend(entry for entry in path if entry not in sys.path)
    try:
        trainer = _trainer(spec)
        limit_threads(threads)
        result = run_one(trainer, TrialPlan.from_json(plan), lambda: False)
    except InvalidInputError as problem:
        return {"refused": [problem.value, problem.requirement, problem.remedy]}
    return {"result": result.to_dict()}


@functools.lru_cache(maxsize=1)
def _trainer(spec: str) -> Trainer:
    """Load a workload once per worker."""
    return load_trainer(WorkerSpec.from_json(spec))


def _start(ray: Any, address: str | None, slots: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    local = {} if address is not None else {"num_cpus": slots, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **local)
    except Exception as problem:  # noqa: BLE001 - Ray raises bare Exceptions as well
        raise InvalidInputError(
            f"Ray cluster {address or 'on this machine'!r}",
            f"it cannot be reached ({in_one_line(problem)})",
            "start it, or leave the address out to use this machine",
        ) from None


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingExtraError("the Ray executor", package="ray", extra="ray") from None
    return ray
