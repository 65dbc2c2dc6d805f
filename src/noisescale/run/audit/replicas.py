"""The batch split over real processes, and what becomes of processes that die."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noisescale.measure.probe_process import _INSIDE, Parcel
from noisescale.run.audit.bench import Bench
from noisescale.run.executors.worker_process import name_of_death

LOOK_EVERY = 0.05
"""Seconds between two looks at the processes. (assumed)"""

SETTLE = 0.3
"""Seconds until the neighbours of a dead process have failed too. (assumed)"""

# The child's import path is the parent's, so that whatever can be imported here can be there.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop());"
    "from noisescale.run.audit.replica_worker import main; main()"
)


class ReplicasError(Exception):
    """Why there are no replicas' gradients, in one line."""


@dataclass(frozen=True)
class Averaged:
    """The mean of the replicas' gradients.

    Attributes:
        found: a gradient per condition asked for.
        through: ``DistributedDataParallel`` or ``all_reduce``.
        detail: why it was not the former; empty otherwise.
        apart: parameters that DistributedDataParallel left different on the replicas.
    """

    found: list[dict[int, Tensor]]
    through: str
    detail: str
    apart: tuple[str, ...]


def average_over_replicas(
    parcel: Parcel,
    bench: Bench,
    parts: Sequence[Tensor],
    passes: Sequence[tuple[str | None, Sequence[int]]],
    *,
    timeout: float,
) -> Averaged:
    """Differentiate every part in a process of its own and average, as data parallelism does.

    Args:
        parcel: the workload, packed.
        bench: the weights and the examples.
        parts: one per replica.
        passes: how to be quiet, and the seeds to average over, one pair per gradient.
        timeout: seconds for all of it.

    Raises:
        ReplicasError: a process died, or time was up; none is left behind.
    """
    with tempfile.TemporaryDirectory(prefix="noisescale-audit-") as folder:
        crew = _Crew(Path(folder))
        try:
            for rank, part in enumerate(parts):
                task = {
                    "folder": folder,
                    "rank": rank,
                    "world": len(parts),
                    "timeout": timeout,
                    "threads": max(1, torch.get_num_threads() // len(parts)),
                    "main": parcel.main_module,
                    "workload_bytes": len(parcel.payload),
                }
                crew.hire(rank, task, parcel.payload + _load(bench, part, passes))
            crew.wait(time.monotonic() + timeout, timeout)
        finally:
            crew.disband()
        kept: dict[str, Any] = torch.load(Path(folder) / "result.pt", weights_only=True)
    return Averaged(
        found=kept["found"],
        through=kept["through"],
        detail=kept["detail"],
        apart=tuple(kept["apart"]),
    )


def _load(bench: Bench, part: Tensor, passes: Sequence[tuple[str | None, Sequence[int]]]) -> bytes:
    """Pickle what a replica computes with."""
    state = {name: value.cpu() for name, value in _state(bench).items()}
    content = {
        "seed": bench.seeds[0],
        "state": state,
        "batch": bench.examples.batch(part),
        "passes": [(quiet, list(seeds)) for quiet, seeds in passes],
    }
    try:
        return pickle.dumps(content)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as problem:
        raise ReplicasError(f"a batch cannot be sent to another process ({problem})") from None


def _state(bench: Bench) -> dict[str, Tensor]:
    """Return parameters and buffers, those that are not saved with a model too."""
    return {**dict(bench.model.named_parameters()), **dict(bench.model.named_buffers())}


class _Crew:
    """The processes, each in a group of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def hire(self, rank: int, task: dict[str, Any], content: bytes) -> None:
        words = (self._folder / f"words-{rank}").open("wb")
        with words:
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps([str(entry) for entry in sys.path])],
                stdin=subprocess.PIPE,
                stdout=words,
                stderr=words,
                env={
                    **os.environ,
                    _INSIDE: "1",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(task["world"]),
                },
                # Ctrl-C is for the parent to handle, and what a replica starts dies with it.
                start_new_session=True,
            )
        self._processes[rank] = process
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # that it is dead is noticed by wait()
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.write(len(content).to_bytes(8, "big") + content)
            process.stdin.flush()

    def wait(self, until: float, seconds: float) -> None:
        """Wait until all have ended well.

        Raises:
            ReplicasError: one has not, or time is up.
        """
        waiting = dict(self._processes)
        while waiting:
            statuses = {rank: process.poll() for rank, process in waiting.items()}
            if any(statuses.values()):
                raise ReplicasError(self._death())
            waiting = {rank: waiting[rank] for rank, status in statuses.items() if status is None}
            if waiting and time.monotonic() > until:
                names = " and ".join(str(rank) for rank in waiting)
                raise ReplicasError(
                    f"replica {names} of {len(self._processes)} did not finish within {seconds:g} s"
                )
            time.sleep(LOOK_EVERY)

    def disband(self) -> None:
        """Leave no process behind."""
        for process in self._processes.values():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with suppress(BrokenPipeError):
                assert process.stdin is not None
                process.stdin.close()

    def _death(self) -> str:
        """Tell of the process that failed first: the others fail for want of it."""
        time.sleep(SETTLE)
        statuses = {rank: process.poll() for rank, process in self._processes.items()}
        failed = {rank: status for rank, status in statuses.items() if status}
        told = {rank: self._folder / f"problem-{rank}" for rank in failed}
        silent = [rank for rank, file in told.items() if not file.exists()]
        rank = silent[0] if silent else min(told, key=lambda r: told[r].stat().st_mtime_ns)
        whose = f"replica {rank} of {len(self._processes)}"
        if not silent:
            return f"{whose} failed: {told[rank].read_text().strip()}"
        lines = (self._folder / f"words-{rank}").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{whose} {name_of_death(failed[rank])}" + (f" ({last[:200]})" if last else "")
