"""The processes of one workload, kept from one batch size to the next."""

from __future__ import annotations

import pickle
import sys
import tempfile
import time
from functools import cached_property
from multiprocessing.connection import wait
from typing import IO, Any, Self

import torch
from torch.utils._pytree import tree_leaves

from noisescale.run.trials.bench import Bench
from noisescale.run.trials.processes.likeness import alike, likeness
from noisescale.run.trials.processes.nursery import Nursery
from noisescale.run.trials.processes.process import Process
from noisescale.workload import Workload

WORTH_STARTING = 4.0
"""Seconds of training, as planned so far, that processes are started for. (assumed: loading torch
takes each of them about 2)"""

WORTH_WAITING = 10.0
"""Seconds of training that wait until they have started; what is shorter goes ahead in threads.
(assumed)"""

LOADING_SECONDS = 120.0
"""What processes get to load before threads train instead. (assumed)"""

LARGEST = 4 << 30
"""Bytes of data that are copied for processes to map. (assumed: seconds of writing)"""

START_TRIES = 10
"""Processes that may die while loading before no more is started. (assumed)"""


class TrialProcesses:
    """Trains trials of one workload side by side, each process with one thread.

    They have a lock of Python's each, which two threads hand to and fro between small products,
    and a death ends only what that process was training. Results are those of threads. Where
    they cannot be had, threads train: elsewhere than on Linux, on a GPU, for a workload that
    cannot be pickled or is another one when it is loaded again (functions of ``__main__``,
    closures, data drawn at import).

        with TrialProcesses(workload) as processes:
            for plans in plans_by_batch_size:
                train_trials(workload, plans, processes=processes)

    Args:
        workload: model, loss and data.

    Attributes:
        workload: as above.
        refused: why there are none; empty while there may be.
        processes: that run.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.refused = ""
        self.processes: list[Process] = []
        self._nursery: Nursery | None = None
        self._package: IO[bytes] | None = None
        self._likeness: list[float] = []
        self._planned = 0.0
        self._deaths = 0

    @cached_property
    def bench(self) -> Bench:
        """What this process trains the workload's trials with."""
        return Bench(self.workload)

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(self, *problem: object) -> None:
        """Leave no process behind."""
        self.close()

    def close(self) -> None:
        """Kill what runs; another call may start it again."""
        if self._nursery is not None:
            self._nursery.close()  # and all that it forked
            self._nursery = None
        while self.processes:
            self.processes.pop().kill()
        if self._package is not None:
            self._package.close()
            self._package = None

    def usable(self, count: int, seconds: float) -> bool:
        """Return whether so many processes can train now, having started them if it is worth it.

        Args:
            count: processes.
            seconds: of training, with all of them, at most; infinite where nothing is known.
        """
        self._planned += seconds if seconds != float("inf") else 0.0
        if not self.processes and self._planned < WORTH_STARTING:
            return False
        return self.start(count, patient=seconds >= WORTH_WAITING)

    def start(self, count: int, *, patient: bool = True) -> bool:
        """Start processes that do not run yet; return whether so many are ready.

        Args:
            count: processes.
            patient: wait until they are.
        """
        until = time.monotonic() + LOADING_SECONDS
        while not self.refused:
            self.grow(count)
            loading = [process for process in self.processes[:count] if not process.ready]
            if not loading:
                break
            wait([process.connection for process in loading], timeout=1.0 if patient else 0)
            for process in loading:
                self.welcome(process, process.receive())
            if time.monotonic() > until:
                self._refuse(f"processes did not load in {LOADING_SECONDS:g} s")
            if not patient:
                break
        return not self.refused and all(process.ready for process in self.processes[:count])

    def grow(self, count: int) -> None:
        """Have so many processes, ready or loading; fewer where they are refused."""
        for process in self.processes[:]:
            if not process.working and process.death() is not None:
                self.bury(process)
        while len(self.processes) < count and (nursery := self._started()) is not None:
            self.processes.append(Process(nursery))

    def welcome(self, process: Process, messages: list[tuple[Any, ...]]) -> None:
        """Take what a process says that has not been ready."""
        for kind, content in messages:
            if kind == "ready" and alike(content, self._likeness):
                process.ready, self._deaths = True, 0
            else:
                why = content if kind == "unloadable" else "is another one when loaded again"
                self._refuse(f"workload {self.workload.name!r} {why}")

    def bury(self, process: Process) -> None:
        """Let go of a process, dead or not."""
        if process not in self.processes:  # refused with all others meanwhile
            return
        process.kill()
        self.processes.remove(process)
        if not process.ready:
            self._deaths += 1

    def _refuse(self, why: str) -> None:
        self.refused = self.refused or why
        for process in [each for each in self.processes if not each.working]:
            process.kill()
            self.processes.remove(process)

    def _started(self) -> Nursery | None:
        """Return what forks, started anew if it has died."""
        if self._nursery is not None and not self._nursery.alive:
            self._nursery.close()
            self._nursery = None
            self._deaths += 1
        if self._deaths >= START_TRIES:
            self._refuse(f"{self._deaths} processes died while loading")
        package = None if self.refused else self._packed()
        if package is not None and self._nursery is None:
            try:
                self._nursery = Nursery(package.fileno())
            except OSError as problem:
                self._refuse(f"no process can be started: {problem}")
        return None if self.refused else self._nursery

    def _packed(self) -> IO[bytes] | None:
        """Return the file that holds the workload, whose tensors all processes map."""
        if sys.platform != "linux" or self.bench.device.type != "cpu":
            self._refuse("processes need Linux and a model on the CPU")
        elif _data_bytes(self.workload) > LARGEST:
            self._refuse(f"more than {LARGEST >> 30} GB of data would be copied to a file")
        elif self._package is None:
            package = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
            settings = (torch.get_default_dtype(), torch.get_float32_matmul_precision())
            try:
                torch.save((settings, self.workload), package, pickle_module=pickle)
                package.flush()
                self._likeness = likeness(self.workload)
                self._package = package
            except Exception as problem:  # noqa: BLE001  pickling runs anybody's code
                package.close()
                self._refuse(f"workload {self.workload.name!r} cannot be sent: {problem}")
        return self._package


def _data_bytes(workload: Workload) -> int:
    """Return the bytes of tensors and arrays; datasets are not looked into."""
    leaves = tree_leaves((workload.train, workload.evaluate))
    return sum(int(getattr(leaf, "nbytes", 0)) for leaf in leaves)
