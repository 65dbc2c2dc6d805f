"""What Slurm says of jobs: which are in its queue, and how one ended."""

from __future__ import annotations

import getpass
import subprocess
import time
from collections.abc import Iterable
from typing import Any, Protocol

ANSWER_SECONDS = 60
"""How long a command of Slurm may take; a busy controller takes tens of seconds. (assumed)"""

END_SECONDS = 10
"""How long a local job may take to end after its last result. (assumed)"""

_OVER = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "TIMEOUT",
    }
)


class Queue(Protocol):
    """Tells which jobs may still give results."""

    def alive(self, jobs: Iterable[Any]) -> set[str] | None:
        """Return the ids of all jobs that wait or run; None when that cannot be told now."""

    def end_of(self, job_id: str) -> str:
        """Say how a job ended; empty when that is not known."""

    def cancel(self, job_id: str, job: Any) -> None:
        """Take a job out of the queue, or kill it; that it is over already is no error."""

    def close(self) -> None:
        """Called once all jobs are done or cancelled."""


class SlurmQueue:
    """Asks ``squeue``, and ``sacct`` where there is accounting."""

    def alive(self, jobs: Iterable[Any]) -> set[str] | None:  # noqa: ARG002 - one question for all
        """Return the ids of all of this user's jobs in the queue that are not over."""
        answer = _ask("squeue", "--noheader", "--format=%A %T", f"--user={getpass.getuser()}")
        if answer is None:
            return None
        rows = [line.split() for line in answer.splitlines()]
        return {row[0] for row in rows if len(row) == 2 and row[1] not in _OVER}

    def end_of(self, job_id: str) -> str:
        """Return the state that Slurm's accounting has noted, for example ``OUT_OF_MEMORY``."""
        asked = ("--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job_id}")
        states = (_ask("sacct", *asked) or "").split("\n")
        words = states[0].split()  # "CANCELLED by 1000"
        return words[0] if words and words[0] in _OVER else ""

    def cancel(self, job_id: str, job: Any) -> None:  # noqa: ARG002 - its number suffices
        """Run ``scancel``."""
        _ask("scancel", job_id)

    def close(self) -> None:
        """Nothing is held."""


class OwnProcesses:
    """The jobs of submitit's local executor, which are processes of this machine."""

    def __init__(self) -> None:
        self._seen: dict[str, Any] = {}

    def alive(self, jobs: Iterable[Any]) -> set[str] | None:
        """Return the ids of the processes that run."""
        self._seen.update((str(job.job_id), job) for job in jobs)
        return {job_id for job_id, job in self._seen.items() if not job.done(force_check=True)}

    def end_of(self, job_id: str) -> str:  # noqa: ARG002 - nothing is noted
        """Nothing is known."""
        return ""

    def cancel(self, job_id: str, job: Any) -> None:
        """Kill the process."""
        self._seen[job_id] = job
        if not job.done(force_check=True):
            job.cancel(check=False)

    def close(self) -> None:
        """Wait until all processes are gone: each has told all it had to tell."""
        while self._seen:
            job_id, job = self._seen.popitem()
            until = time.monotonic() + END_SECONDS
            while not job.done(force_check=True) and time.monotonic() < until:
                time.sleep(0.02)
            self.cancel(job_id, job)
            del self._seen[job_id]


def _ask(*command: str) -> str | None:
    """Return what a command prints; None when it fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
