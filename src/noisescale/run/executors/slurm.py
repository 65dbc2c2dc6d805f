"""Trials as Slurm jobs, submitted through submitit.

Slurm loses jobs, delays them, and sometimes runs one twice. So nothing depends on a job's own
report: each result is a file in a shared folder, named by its trial's key, and the driver takes
what appears there, whichever job made it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noisescale.errors import InvalidInputError, MissingExtraError
from noisescale.records import TrialOutcome, TrialPlan, TrialResult
from noisescale.run.executors.deaths import Deaths
from noisescale.run.executors.executor import RETRIES, OnResult, ShouldStop, WorkerSpec
from noisescale.run.executors.one_trial import in_one_line
from noisescale.run.executors.slurm_job import forget_answer, read_answers, train_batch
from noisescale.run.executors.slurm_queue import OwnProcesses, Queue, SlurmQueue

SUBMIT_TRIES = 5
"""Refusals of ``sbatch`` in a row, a poll apart, before it is the user's to look at. (assumed)"""

PARAMETERS = {"timeout_min": 60, "cpus_per_task": 1}
"""What a job asks for unless told otherwise, as submitit spells it. (assumed)"""


_TRY_ANEW = (TrialOutcome.CRASHED, TrialOutcome.INTERRUPTED)


class SlurmExecutor:
    """Some trials per job, some jobs at a time.

    A job that is in the queue no more and has left no result for ``grace`` seconds is lost: its
    trials are submitted again, in smaller jobs. A trial whose job gave nothing at all more than
    ``retries`` times is recorded as crashed, or as infeasible for memory where Slurm says so.
    Within a job each trial has a process of its own, as :class:`LocalExecutor` does it. Stopping
    cancels the jobs; a killed driver leaves them, and the next one takes them over.

    Args:
        spec: what the jobs train.
        folder: seen by the driver and all machines alike; ``noisescale-slurm`` here by default.
        slots: jobs at a time.
        trials_per_job: trials per job.
        retries: times that a lost trial is submitted again.
        parameters: what a job asks for, as submitit spells it (``timeout_min``, ``mem_gb``,
            ``slurm_partition``, ...).
        cluster: ``slurm``, or ``local`` for submitit's own processes.
        grace: seconds that a result may take to appear after its job has left the queue.
        poll: seconds between two looks.

    Raises:
        MissingExtraError: submitit is not installed.
        InvalidInputError: there is no Slurm here, or a parameter is not one.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        folder: str | os.PathLike[str] | None = None,
        slots: int | None = None,
        trials_per_job: int = 8,
        retries: int = RETRIES,
        parameters: Mapping[str, Any] | None = None,
        cluster: str = "slurm",
        grace: float = 60.0,
        poll: float = 5.0,
    ) -> None:
        self.spec = spec
        self.folder = Path("noisescale-slurm" if folder is None else folder).expanduser().resolve()
        self.slots = 16 if slots is None else slots
        self.trials_per_job = trials_per_job
        self.retries = retries
        self.grace = grace
        self.poll = poll
        self.parameters = {**PARAMETERS, **(parameters or {})}
        self.submitter = _submitter(self.folder / "jobs", cluster, self.parameters)
        self.queue: Queue = SlurmQueue() if cluster == "slurm" else OwnProcesses()

    def run(
        self,
        plans: Sequence[TrialPlan],
        *,
        on_result: OnResult,
        should_stop: ShouldStop | None = None,
    ) -> None:
        """Train every plan in jobs; see :class:`Executor`."""
        (self.folder / "results").mkdir(parents=True, exist_ok=True)
        jobs = _Jobs(self, plans, on_result)
        try:
            jobs.work(should_stop or (lambda: False))
        finally:
            jobs.cancel()


@dataclass
class _Job:
    """One job: what it was to train, and whether anything of that has come."""

    job: Any  # submitit's; None for one taken over
    keys: set[str]
    tries: int
    fruitful: bool = False
    missed_since: float | None = None


class _Jobs:
    """The jobs of one run."""

    def __init__(
        self, executor: SlurmExecutor, plans: Sequence[TrialPlan], on_result: OnResult
    ) -> None:
        self._executor = executor
        self._plans = {plan.key: plan for plan in plans}
        self._results = executor.folder / "results"
        self._notes = executor.folder / "jobs.jsonl"
        self._waiting: deque[tuple[list[str], int]] = deque()
        self._jobs: dict[str, _Job] = {}
        self._deaths = Deaths(executor.retries)
        self._on_result = on_result
        self._refusals = 0

    def work(self, should_stop: ShouldStop) -> None:
        """Until everything is done or should stop."""
        self._take_what_is_there()
        self._take_over()
        held = {key for job in self._jobs.values() for key in job.keys}
        self._enqueue([key for key in self._plans if key not in held], tries=0)
        while self._plans and not should_stop():
            self._submit()
            self._nap(should_stop)
            self._collect()
            self._look_for_lost_jobs()

    def cancel(self) -> None:
        """Take what runs and waits out of Slurm's queue."""
        while self._jobs:
            job_id, job = self._jobs.popitem()
            self._executor.queue.cancel(job_id, job.job)
        self._executor.queue.close()

    def _nap(self, should_stop: ShouldStop) -> None:
        until = time.monotonic() + self._executor.poll
        while (left := until - time.monotonic()) > 0 and not should_stop():
            time.sleep(min(left, 0.2))

    def _take_what_is_there(self) -> None:
        """Results that jobs of an earlier driver left; a failure there is tried anew."""
        for key, answer in list(read_answers(self._results, set(self._plans))):
            if "result" in answer and answer["result"]["outcome"] not in _TRY_ANEW:
                self._deliver(key, answer)
            else:
                forget_answer(self._results, key)

    def _take_over(self) -> None:
        """Jobs of an earlier driver that Slurm still has."""
        if not self._notes.exists() or not isinstance(self._executor.queue, SlurmQueue):
            return
        alive = self._executor.queue.alive(()) or set()
        for line in self._notes.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line torn by a kill
                note = json.loads(line)
                keys = set(note["keys"]) & set(self._plans)
                if note["job"] in alive and keys:
                    self._jobs[note["job"]] = _Job(None, keys, tries=0)

    def _enqueue(self, keys: list[str], *, tries: int) -> None:
        # Halved at every try, so that in the end a trial that kills its job is alone in it.
        size = max(1, self._executor.trials_per_job >> tries)
        for start in range(0, len(keys), size):
            self._waiting.append((keys[start : start + size], tries))

    def _submit(self) -> None:
        while self._waiting and len(self._jobs) < self._executor.slots:
            keys, tries = self._waiting[0]
            keys = [key for key in keys if key in self._plans]  # a job thought lost may have come
            if keys:
                job = self._try_to_submit(keys)
                if job is None:
                    return
                self._jobs[str(job.job_id)] = _Job(job, set(keys), tries)
            self._waiting.popleft()

    def _try_to_submit(self, keys: list[str]) -> Any | None:
        """Return the job, or None when Slurm does not take it now."""
        executor = self._executor
        texts = [self._plans[key].to_json() for key in keys]
        path = [str(entry) for entry in sys.path]
        slots = int(executor.parameters["cpus_per_task"])
        try:
            job = executor.submitter.submit(
                train_batch, executor.spec.to_json(), texts, str(self._results), path, slots
            )
        except Exception as problem:  # noqa: BLE001 - submitit's errors have no base of their own
            self._refusals += 1
            if self._refusals < SUBMIT_TRIES:
                return None
            raise InvalidInputError(
                "Slurm",
                f"sbatch refused {self._refusals} times in a row ({in_one_line(problem)[:300]})",
                "correct the parameters, or try again when it answers",
            ) from None
        self._refusals = 0
        with self._notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"job": str(job.job_id), "keys": keys}) + "\n")
        return job

    def _collect(self) -> None:
        for key, answer in list(read_answers(self._results, set(self._plans))):
            self._deliver(key, answer)
        for job_id in [job_id for job_id, job in self._jobs.items() if not job.keys]:
            del self._jobs[job_id]

    def _deliver(self, key: str, answer: dict[str, Any]) -> None:
        if "refused" in answer:
            forget_answer(self._results, key)
            raise InvalidInputError(*answer["refused"])
        self._on_result(TrialResult.from_dict(answer["result"]))
        forget_answer(self._results, key)
        self._done(key)

    def _done(self, key: str) -> None:
        """A trial has its result: a second one, from a job run twice, is not looked at."""
        del self._plans[key]
        for job in self._jobs.values():
            if key in job.keys:
                job.keys.remove(key)
                job.fruitful = True

    def _look_for_lost_jobs(self) -> None:
        alive = self._executor.queue.alive(job.job for job in self._jobs.values())
        if alive is None:  # Slurm does not answer: nothing is known
            return
        now = time.monotonic()
        for job_id, job in list(self._jobs.items()):
            if job_id in alive:
                job.missed_since = None
            elif job.missed_since is None:
                job.missed_since = now
            elif now - job.missed_since >= self._executor.grace:
                del self._jobs[job_id]
                self._mourn(job_id, job)

    def _mourn(self, job_id: str, job: _Job) -> None:
        """See to the trials of a lost job."""
        again = []
        end = self._executor.queue.end_of(job_id)
        words = f"Slurm's job {job_id} ended without a result{f' ({end})' if end else ''}"
        for key in sorted(job.keys):
            # Where others of the job came through, this one may not even have started.
            lost = None if job.fruitful else self._verdict(key, words, end)
            if lost is None:
                again.append(key)
            else:
                self._on_result(lost)
                self._done(key)
        self._enqueue(again, tries=job.tries + 1)

    def _verdict(self, key: str, words: str, end: str) -> TrialResult | None:
        return self._deaths.verdict(self._plans[key], words, for_memory=end == "OUT_OF_MEMORY")


def _submitter(folder: Path, cluster: str, parameters: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise MissingExtraError("the Slurm executor", package="submitit", extra="slurm") from None
    try:
        submitter = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as problem:
        raise InvalidInputError(
            "Slurm", f"it is not on this machine ({problem})", "run this where sbatch and srun are"
        ) from None
    try:
        submitter.update_parameters(**parameters)
    except (NameError, TypeError, ValueError) as problem:
        words = str(problem).split("\n", 1)[0]
        raise InvalidInputError(
            "Slurm's parameters", words, "see submitit's AutoExecutor.update_parameters"
        ) from None
    return submitter
